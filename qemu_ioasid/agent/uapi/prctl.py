"""include/uapi/linux/prctl.h."""

PR_SET_PDEATHSIG = 1
