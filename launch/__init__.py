"""Processes: launch scripts, the process group, signals, exit statuses, and log lines."""
