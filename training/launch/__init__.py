"""Processes: how ranks are started, watched, ended, and why they ended."""
