"""This machine: its memory, processes, folders and files. Above base."""
