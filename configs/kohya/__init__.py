"""Import of settings from kohya's scripts and the first sdxl-trainer: option tables, file readers, conversion.

Settings of this project do not belong here.
"""
