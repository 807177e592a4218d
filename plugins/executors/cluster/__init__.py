"""Ranks as actors of a Ray cluster: how they are placed, spoken to, watched and ended.

Only two processes know of Ray: the launcher (a child of the executor's process) and the actors. Steps go over TCP from
the executor to each rank, past Ray: an actor call takes as long as a small model's whole step, and a closed connection
tells of a lost rank at once, where Ray waits for missing heartbeats.
"""
