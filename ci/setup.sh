# SPDX-License-Identifier: GPL-2.0-or-later
# Sourced by the other scripts here: everything a fresh machine needs, nothing it has already.
# Leaves the current folder at the project's root and the programs of .venv first in PATH.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What each is for: the kernel's build, the images, Python, the tests of the series.
PACKAGES=(
	gcc make flex bison bc libelf-dev libssl-dev libc6-dev patch perl xz-utils kmod
	mmdebstrap erofs-utils debian-archive-keyring cpio
	python3 python3-venv
	sparse
)

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
	# Architecture-qualified names (libc6-dev:amd64) count under their plain name.
	have=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${PACKAGES[@]}" 2>/dev/null |
		sed -n 's/ installed$//p')
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
	"${apt[@]}" update >&2 && "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2 ||
		die 3 "apt-get could not install: ${missing[*]}"
}

install_project() {
	local stamp want
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		die 3 "python3 is $(python3 -V 2>&1); 3.11 or newer is needed"
	stamp=.venv/installed
	want=$({ cat pyproject.toml ci/requirements.txt && python3 -V && pwd; } | sha256sum)
	[ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
	echo "installing the project into .venv" >&2
	rm -rf .venv
	python3 -m venv .venv || die 3 "python3 -m venv failed; is python3-venv installed?"
	.venv/bin/pip install -q --disable-pip-version-check -r ci/requirements.txt >&2 &&
		.venv/bin/pip install -q --disable-pip-version-check --no-deps -e . >&2 ||
		die 3 "pip could not install the project; is PyPI, or a mirror of it, in reach?"
	echo "$want" >"$stamp"
}

if supported; then
	install_packages
else
	command -v dpkg-query >/dev/null && command -v apt-get >/dev/null && missing=$(missing_packages) ||
		missing=${PACKAGES[*]}
	[ -z "$missing" ] ||
		die 3 "made for Debian 12, Ubuntu 24.04 and later; here, install what these Debian packages hold, and run again: ${missing//$'\n'/ }"
fi
install_project
PATH=$PWD/.venv/bin:$PATH
