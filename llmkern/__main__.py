import sys

from llmkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
