"""The files of a run are written and read like all others (loft_hpc/files.py)."""

from loft_hpc.files import checksum, publish_folder, read_json, read_tensors, write_atomically, write_json, write_tensors

__all__ = ["checksum", "publish_folder", "read_json", "read_tensors", "write_atomically", "write_json", "write_tensors"]
