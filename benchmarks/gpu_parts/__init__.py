"""The parts of `benchmarks/gpu_day.py`, each a module with a function `list_cases`.

A part runs in a process of its own and writes its JSON after every measurement. Shared modules: report.py (the JSON),
devices.py (time and memory of a device), full_size.py and fit.py (a run at SDXL's size without files of weights).
"""
