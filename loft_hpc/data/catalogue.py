"""Names of the data sets and what the command line asks about them, without torch."""

CIFAR = ("cifar10", "cifar100")
IMAGE_FOLDERS = ("imagenet", "imagefolder")
"""Images on disk, in train/ and val/."""
DOWNLOADED = ("fashion-mnist", *CIFAR)
"""What --download serves."""
DATASET_NAMES = ("digits", "textures", *DOWNLOADED, *IMAGE_FOLDERS, "synthetic")
FIXED_SIZE = ("digits", *DOWNLOADED)
"""Data sets whose images have one size."""
SPLITS = ("train", "val")
"""Folders of `IMAGE_FOLDERS`: training images and test images."""
MAX_LOADER_WORKERS = 256
CHECKED_AT_ONCE = 64
"""Images in a batch of which only is asked whether they can be read."""
