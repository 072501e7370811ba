// SPDX-License-Identifier: GPL-2.0-or-later
/* The kernel's calls, each of which answers 0 or more, or an errno, negated */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/iommufd.h>
#include <linux/userfaultfd.h>
#include <linux/vfio.h>

#include "stress.h"

#define MDEVS	"/sys/bus/mdev/devices"
#define TYPES	"/sys/class/mdev_bus/pdma/mdev_supported_types"
#define LISTS	"/sys/kernel/debug/pdma"

#define REGION(index)	((off_t)(index) << 40)

static int answer(long result)
{
	return result < 0 ? -errno : (int)result;
}

static int open_file(const char *path, int flags)
{
	return answer(open(path, flags | O_CLOEXEC));
}

int open_iommufd(void)
{
	return open_file("/dev/iommu", O_RDWR);
}

int ioas_alloc(int iommufd, uint32_t *id)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	int ret = answer(ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc));

	*id = alloc.out_ioas_id;
	return ret;
}

int ioas_destroy(int iommufd, uint32_t id)
{
	struct iommu_destroy destroy = { .size = sizeof(destroy), .id = id };

	return answer(ioctl(iommufd, IOMMU_DESTROY, &destroy));
}

int ioas_map(int iommufd, uint32_t id, void *memory, size_t length,
	     uint64_t iova, bool writeable)
{
	struct iommu_ioas_map map = {
		.size = sizeof(map),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE,
		.ioas_id = id,
		.user_va = (uintptr_t)memory,
		.length = length,
		.iova = iova,
	};

	if (writeable)
		map.flags |= IOMMU_IOAS_MAP_WRITEABLE;
	return answer(ioctl(iommufd, IOMMU_IOAS_MAP, &map));
}

int ioas_unmap(int iommufd, uint32_t id, uint64_t iova, size_t length)
{
	struct iommu_ioas_unmap unmap = {
		.size = sizeof(unmap),
		.ioas_id = id,
		.iova = iova,
		.length = length,
	};

	return answer(ioctl(iommufd, IOMMU_IOAS_UNMAP, &unmap));
}

/* The name of the first entry of a folder that begins so */
static int first(const char *folder, const char *prefix, char *name, size_t size)
{
	DIR *dir = opendir(folder);
	struct dirent *entry;
	int ret = -ENOENT;

	if (!dir)
		return -errno;
	while ((entry = readdir(dir))) {
		if (strncmp(entry->d_name, prefix, strlen(prefix)))
			continue;
		snprintf(name, size, "%s", entry->d_name);
		ret = 0;
		break;
	}
	closedir(dir);
	return ret;
}

int device_open(const char *uuid)
{
	char path[128], name[32];
	int ret;

	snprintf(path, sizeof(path), MDEVS "/%s/vfio-dev", uuid);
	ret = first(path, "vfio", name, sizeof(name));
	if (ret)
		return ret;
	snprintf(path, sizeof(path), "/dev/vfio/devices/%s", name);
	return open_file(path, O_RDWR);
}

int device_bind(int fd, int iommufd)
{
	struct vfio_device_bind_iommufd bind = {
		.argsz = sizeof(bind),
		.iommufd = iommufd,
	};

	return answer(ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &bind));
}

int device_attach(int fd, unsigned int pasid, uint32_t ioas)
{
	struct vfio_device_attach_iommufd_pt pt = {
		.argsz = sizeof(pt),
		.flags = pasid == OWN ? 0 : VFIO_DEVICE_ATTACH_PASID,
		.pt_id = ioas,
		.pasid = pasid,
	};

	return answer(ioctl(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &pt));
}

int device_detach(int fd, unsigned int pasid)
{
	struct vfio_device_detach_iommufd_pt pt = {
		.argsz = sizeof(pt),
		.flags = pasid == OWN ? 0 : VFIO_DEVICE_DETACH_PASID,
		.pasid = pasid,
	};

	return answer(ioctl(fd, VFIO_DEVICE_DETACH_IOMMUFD_PT, &pt));
}

int device_reset(int fd)
{
	return answer(ioctl(fd, VFIO_DEVICE_RESET));
}

uint8_t *device_ring(int fd)
{
	void *ring = mmap(NULL, PDMA_RING_SIZE, PROT_READ | PROT_WRITE,
			  MAP_SHARED, fd, REGION(PDMA_RING_BAR));

	return ring == MAP_FAILED ? NULL : ring;
}

int device_register(int fd, unsigned int offset, uint32_t *value)
{
	return answer(pread(fd, value, sizeof(*value),
			    REGION(PDMA_REGS_BAR) + offset));
}

int device_doorbell(int fd, uint32_t tail)
{
	return answer(pwrite(fd, &tail, sizeof(tail),
			     REGION(PDMA_REGS_BAR) + PDMA_REG_TAIL));
}

/* Accesses of the memory sleep until they are served */
int slow_open(void *memory, size_t length)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { .start = (uintptr_t)memory, .len = length },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int device = open_file("/dev/userfaultfd", O_RDWR);
	int uffd;

	if (device < 0)
		return device;
	uffd = answer(ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK));
	close(device);
	if (uffd < 0)
		return uffd;
	if (ioctl(uffd, UFFDIO_API, &api) ||
	    ioctl(uffd, UFFDIO_REGISTER, &range))
		return -errno;
	return uffd;
}

/* 1 and the page that an access sleeps on, or 0 where none does for a while */
int slow_wait(int uffd, void **page)
{
	struct pollfd wait = { .fd = uffd, .events = POLLIN };
	struct uffd_msg message;

	if (poll(&wait, 1, 50) <= 0 ||
	    read(uffd, &message, sizeof(message)) != sizeof(message) ||
	    message.event != UFFD_EVENT_PAGEFAULT)
		return 0;
	*page = (void *)(message.arg.pagefault.address & ~(PAGE - 1));
	return 1;
}

int slow_serve(int uffd, void *page, const void *content)
{
	struct uffdio_copy copy = {
		.dst = (uintptr_t)page,
		.src = (uintptr_t)content,
		.len = PAGE,
	};

	return answer(ioctl(uffd, UFFDIO_COPY, &copy));
}

static int write_file(const char *path, const char *text)
{
	int fd = open_file(path, O_WRONLY);
	int ret;

	if (fd < 0)
		return fd;
	ret = answer(write(fd, text, strlen(text)));
	close(fd);
	return ret < 0 ? ret : 0;
}

int mdev_create(const char *uuid)
{
	char path[160], name[64];
	int ret = first(TYPES, "pdma", name, sizeof(name));

	if (ret)
		return ret;
	snprintf(path, sizeof(path), TYPES "/%s/create", name);
	return write_file(path, uuid);
}

int mdev_remove(const char *uuid)
{
	char path[128];

	snprintf(path, sizeof(path), MDEVS "/%s/remove", uuid);
	return write_file(path, "1");
}

int module_load(const char *path)
{
	int fd = open_file(path, O_RDONLY);
	int ret;

	if (fd < 0)
		return fd;
	ret = answer(syscall(SYS_finit_module, fd, "", 0));
	close(fd);
	return ret;
}

/* The module of a file; it answers EWOULDBLOCK while somebody uses it */
int module_unload(const char *path)
{
	const char *base = strrchr(path, '/');
	char name[64];
	char *end;

	snprintf(name, sizeof(name), "%s", base ? base + 1 : path);
	end = strstr(name, ".ko");
	if (end)
		*end = 0;
	for (end = name; *end; end++)
		if (*end == '-')
			*end = '_';
	return answer(syscall(SYS_delete_module, name, O_NONBLOCK));
}

/*
 * How many lines the kernel's list of a device has, NULL: the parent's table.
 * EPROTO where it is none: PASIDs ascend, and each line is whole.
 */
int list_length(const char *uuid)
{
	unsigned int last = 0, pasid, ioas, number;
	char path[128], line[80], state[16];
	int lines = 0;
	FILE *file;

	snprintf(path, sizeof(path), LISTS "/%s%s", uuid ?: "table",
		 uuid ? "/pasids" : "");
	file = fopen(path, "re");
	if (!file)
		return -errno;
	while (lines >= 0 && fgets(line, sizeof(line), file)) {
		if (!lines++)
			continue;
		if (sscanf(line, "%u %u %u %15s", &pasid, &ioas, &number,
			   state) != 4 || pasid <= last)
			lines = -EPROTO;
		last = pasid;
	}
	if (ferror(file))
		lines = -EIO;
	fclose(file);
	return lines > 0 ? lines - 1 : lines ?: -EPROTO;
}
