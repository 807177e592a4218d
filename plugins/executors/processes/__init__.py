"""Ranks as processes of one machine: how they are started, spoken to, watched and ended."""
