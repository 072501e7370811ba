"""``python3 -m qemu_ioasid.agent ROLE``; also what the agent's disk starts with."""

import sys

from qemu_ioasid.agent.server import main

if __name__ == "__main__":
    main(sys.argv[1])
