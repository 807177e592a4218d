"""`interlace batch`: files of requests in OpenAI's batch format, answered by an engine in this process."""
