"""Print the packages that the image installs: the dependencies of pyproject.toml and its extra lora.

Usage: python needed.py PYPROJECT
"""

import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["lora"], sep="\n")
