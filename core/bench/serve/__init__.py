"""`interlace bench serve`: a load generator for any server with OpenAI's streaming API, with its own overhead measured.

Read in the order of a run: `workloads` (what is asked), `arrivals` (when), `target` (of whom), `load` (the run),
`client` (one request), `metrics`, `report`, `tables`, `plot`.
"""
