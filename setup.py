from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(line.split('"')[1] for line in (here / "loft_hpc/__init__.py").read_text().splitlines() if line.startswith("__version__"))

export = ["onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.22"]  # for `loft export --format onnx`; torch.export needs none of them

setup(
    name="loft-hpc",
    version=version,
    description="Find winning lottery tickets in convolutional networks, cheaply, on a cluster",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["loft_hpc", "loft_hpc.*"]),
    package_data={"loft_hpc.analysis": ["clusters/*.toml"], "loft_hpc.cli": ["presets/*.toml"]},
    python_requires=">=3.10",
    # torch, torchvision, mpi4py and horovod must match one another: bin/install/pins.txt holds their versions, and bin/setup
    # builds Horovod with the changes that today's torch needs (a plain `pip install horovod` does not compile).
    install_requires=[
        "torch",
        "torchvision",
        "mpi4py",
        "horovod",
        "numpy>=1.26",
        "pillow>=10.1",
        "click>=8.2,<9",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "scikit-image>=0.22",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6", "torch-pruning>=1.5", *export],
        "energy": ["nvidia-ml-py", "codecarbon"],
        "export": export,
    },
    entry_points={"console_scripts": ["loft = loft_hpc.__main__:main"]},
)
