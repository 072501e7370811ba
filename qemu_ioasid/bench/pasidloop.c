// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Attaches PASIDs to a VFIO device and detaches them, as fast as one thread
 * can: what the kernel costs, for the registrar to be measured against.
 *
 *   pasidloop /dev/vfio/devices/vfioN PASIDS IOASES TIMES
 *
 * PASIDs 1 to PASIDS, which take the address spaces in turn, all of them
 * attached and then all detached, TIMES times over. Prints one JSON object:
 * the nanoseconds of one call of each kind, on average. Nobody else may have
 * the device open.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>

/* As many calls are enough where nothing grows */
#define SOME	1000

static int iommufd;
static int device;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1e9 + ts.tv_nsec;
}

static unsigned int number(const char *text)
{
	char *end;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &end, 10);
	if (!errno && (*end || !value || value > 1 << 20))
		errno = EINVAL;
	if (errno)
		err(1, "%s", text);
	return value;
}

static int open_file(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		err(1, "%s", path);
	return fd;
}

static void bind_device(void)
{
	struct vfio_device_bind_iommufd bind = {
		.argsz = sizeof(bind),
		.iommufd = iommufd,
	};

	if (ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &bind))
		err(1, "bind");
}

static __u32 ioas_alloc(void)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };

	if (ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc))
		err(1, "IOAS alloc");
	return alloc.out_ioas_id;
}

static void ioas_destroy(__u32 id)
{
	struct iommu_destroy destroy = { .size = sizeof(destroy), .id = id };

	if (ioctl(iommufd, IOMMU_DESTROY, &destroy))
		err(1, "destroy IOAS %u", id);
}

static void attach(__u32 pasid, __u32 ioas)
{
	struct vfio_device_attach_iommufd_pt pt = {
		.argsz = sizeof(pt),
		.flags = VFIO_DEVICE_ATTACH_PASID,
		.pt_id = ioas,
		.pasid = pasid,
	};

	if (ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &pt))
		err(1, "PASID %u to IOAS %u", pasid, ioas);
}

static void detach(__u32 pasid)
{
	struct vfio_device_detach_iommufd_pt pt = {
		.argsz = sizeof(pt),
		.flags = VFIO_DEVICE_DETACH_PASID,
		.pasid = pasid,
	};

	if (ioctl(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, &pt))
		err(1, "PASID %u away", pasid);
}

/* A call that the core refuses when it has read the struct: no driver's work */
static void refused(void)
{
	struct vfio_device_attach_iommufd_pt pt = { .argsz = 0 };

	if (!ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &pt) ||
	    errno != EINVAL)
		err(1, "an attach of no size");
}

/* Do statement once for each i below count; the nanoseconds all that took */
#define TIMED(count, statement)						\
	({								\
		double start = now();					\
									\
		for (i = 0; i < (count); i++)				\
			statement;					\
		now() - start;						\
	})

int main(int argc, char **argv)
{
	double attached = 0, detached = 0, again = 0;
	double alloc, pair, nothing, destroy;
	unsigned int pasids, ioases, times, some, i, round;
	__u32 *ioas;

	if (argc != 5) {
		fputs("usage: pasidloop DEVICE PASIDS IOASES TIMES\n", stderr);
		return 2;
	}
	pasids = number(argv[2]);
	ioases = number(argv[3]);
	times = number(argv[4]);
	some = pasids < SOME ? pasids : SOME;
	ioas = calloc(ioases, sizeof(*ioas));
	if (!ioas)
		err(1, "%u IOASes", ioases);
	iommufd = open_file("/dev/iommu");
	device = open_file(argv[1]);
	bind_device();

	alloc = TIMED(ioases, ioas[i] = ioas_alloc());
	for (round = 0; round < times; round++) {
		attached += TIMED(pasids, attach(i + 1, ioas[i % ioases]));
		again += TIMED(some, attach(i + 1, ioas[i % ioases]));
		detached += TIMED(pasids, detach(i + 1));
	}
	pair = TIMED(some, {
		attach(i + 1, ioas[i % ioases]);
		detach(i + 1);
	});
	nothing = TIMED(some, refused());
	destroy = TIMED(ioases, ioas_destroy(ioas[i]));

	printf("{\"attach\": %.1f, \"detach\": %.1f, \"attach_again\": %.1f, ",
	       attached / times / pasids, detached / times / pasids,
	       again / times / some);
	printf("\"pair\": %.1f, \"refused\": %.1f, ", pair / some,
	       nothing / some);
	printf("\"ioas_alloc\": %.1f, \"ioas_destroy\": %.1f}\n",
	       alloc / ioases, destroy / ioases);
	return 0;
}
