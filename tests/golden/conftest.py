"""The script that recorded golden.json is no test."""

collect_ignore = ["record_old.py"]
