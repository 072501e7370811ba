"""The agent: the part of the project that runs inside the VMs.

Standard library only. It is sent into a VM as a zip over SSH and serves one JSON object a line
(see ``server``). The role decides the operations: ``host`` (which owns /dev/iommu, the mdevs and
the guests) or ``guest``.

Start-up is paid under nested TCG, so modules here keep clear of ``typing``, ``dataclasses``,
``asyncio`` and the like, and import lazily what only some operations need.
"""
