"""Prometheus metrics: what is counted (`totals`, `http`), under which names (`names`), and how it is served (`routes`).

Nothing is global: each server has totals and a registry of its own.
"""
