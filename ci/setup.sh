# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# Sourced by the other scripts here: everything a fresh machine needs, nothing it has already.
# Leaves the current folder at the project's root and the programs of .venv first in PATH.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# The kernel's build, the images, Python; EXTRA_PACKAGES is the caller's own.
read -ra PACKAGES <<<"gcc libc6-dev make flex bison bc libelf-dev patch xz-utils \
	libcap-dev uuid-dev mmdebstrap erofs-utils debian-archive-keyring python3 python3-venv ${EXTRA_PACKAGES:-}"

die() { # exit-code message...
	local code=$1
	shift
	printf '%s: %s\n' "ci/$(basename "$0")" "$*" >&2
	exit "$code"
}

supported() {
	[ -r /etc/os-release ] || return 1
	# shellcheck source=/dev/null
	. /etc/os-release
	case "${ID:-}" in
	debian) [ -z "${VERSION_ID:-}" ] || [ "${VERSION_ID%%.*}" -ge 12 ] ;;
	ubuntu) [ "${VERSION_ID%%.*}" -ge 24 ] ;;
	*) return 1 ;;
	esac
}

missing_packages() {
	local have
	# dpkg-query fails when it has never heard of one of them, and says the rest all the same.
	have=$({ dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${PACKAGES[@]}" || true; } \
		2>/dev/null | sed -n 's/ installed$//p')
	comm -23 <(printf '%s\n' "${PACKAGES[@]}" | sort) <(printf '%s\n' "$have" | sort)
}

install_packages() {
	local missing root=()
	mapfile -t missing < <(missing_packages)
	[ ${#missing[@]} -gt 0 ] || return 0
	echo "installing system packages: ${missing[*]}" >&2
	if [ "$(id -u)" -ne 0 ]; then
		command -v sudo >/dev/null ||
			die 3 "not root and no sudo; have these installed: ${missing[*]}"
		root=(sudo)
	fi
	local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
	if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } >&2
	then
		die 3 "apt-get could not install: ${missing[*]}"
	fi
}

install_project() {
	local stamp=.venv/installed want lock python
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		die 3 "python3 is $(python3 -V 2>&1); 3.11 or newer is needed"
	want=$({ cat pyproject.toml ci/requirements.txt && python3 -V && pwd; } | sha256sum)
	[ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
	# Two first starts in one clone: the second waits, and finds it done.
	exec {lock}>.venv.lock
	flock "$lock"
	if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
		echo "installing the project into .venv" >&2
		# Ours may be the one in .venv.
		python=$(python3 -c 'import sys; print(sys._base_executable)')
		rm -rf .venv
		"$python" -m venv .venv || die 3 "python3 -m venv failed; is python3-venv installed?"
		local pip=(.venv/bin/pip install -q --disable-pip-version-check)
		if ! { "${pip[@]}" -r ci/requirements.txt && "${pip[@]}" --no-deps -e .; } >&2; then
			die 3 "pip could not install the project; is PyPI, or a mirror of it, in reach?"
		fi
		echo "$want" >"$stamp"
	fi
	exec {lock}>&-
}

check_other_distribution() {
	local missing=("${PACKAGES[@]}")
	if command -v dpkg-query >/dev/null; then
		mapfile -t missing < <(missing_packages)
	fi
	[ ${#missing[@]} -eq 0 ] ||
		die 3 "made for Debian 12, Ubuntu 24.04 and later; here, install what these Debian packages hold, and run again: ${missing[*]}"
}

if supported; then install_packages; else check_other_distribution; fi
install_project
PATH=$PWD/.venv/bin:$PATH
