"""Build map: three top-level folders, one import package."""

from setuptools import find_packages, setup

HOMES = {"dop_fast": "dop_fast", "dop_fast.kernels": "kernels", "dop_fast.cli": "cli"}

packages = set(HOMES)
for name, folder in HOMES.items():
    packages |= {f"{name}.{sub}" for sub in find_packages(folder)}

setup(
    packages=sorted(packages),
    package_dir=HOMES,
    package_data={
        "dop_fast": [
            "py.typed",
            "templates/*",
            "recipes/*.toml",
            "sweep/*.toml",
            "sweep/ready/*.toml",
        ]
    },
)
