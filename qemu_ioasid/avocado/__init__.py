# SPDX-License-Identifier: GPL-2.0-or-later
"""The Avocado plugins: each check of a scenario is a test of its own. See docs/avocado.md."""
