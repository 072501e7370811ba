// SPDX-License-Identifier: GPL-2.0-or-later
/* A process that holds devices and does everything with them at once */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

#include "stress.h"

#define REGISTRARS	2
#define THREADS		(REGISTRARS + DEVICES + 2)

/* How a holder ends that found its devices gone, or that has complained */
#define GONE		3
#define FAILED		1

static void __attribute__((noreturn)) give_up(const char *what, int ret)
{
	if (ret == -ENOENT || ret == -ENODEV || ret == -ENXIO)
		_exit(GONE);
	complain("%s: errno %d", what, -ret);
	_exit(FAILED);
}

static void map_arena(struct holder *holder, unsigned int space)
{
	struct space *map = &holder->spaces[space];
	uint8_t *arena = holder->arenas[space];
	int ret;

	ret = ioas_map(holder->iommufd, map->id, arena + SOURCE * PAGE, PAGE,
		       IOVA + SOURCE * PAGE, false);
	ret = ret ?: ioas_map(holder->iommufd, map->id, arena + LANES * PAGE,
			      ALL_DEVICES * PAGE, IOVA + LANES * PAGE, true);
	if (ret)
		complain("holder %u: map: errno %d", holder->number, -ret);
}

static void open_spaces(struct holder *holder)
{
	uint8_t *slow = mmap(NULL, SPACES * PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned int space;
	int ret;

	if (slow == MAP_FAILED)
		give_up("slow memory", -errno);
	holder->uffd = slow_open(slow, SPACES * PAGE);
	if (holder->uffd < 0)
		give_up("userfaultfd", holder->uffd);
	holder->iommufd = open_iommufd();
	if (holder->iommufd < 0)
		give_up("/dev/iommu", holder->iommufd);
	for (space = 0; space < SPACES; space++) {
		struct space *map = &holder->spaces[space];

		map->slow = slow + space * PAGE;
		pthread_mutex_init(&map->lock, NULL);
		ret = ioas_alloc(holder->iommufd, &map->id);
		ret = ret ?: ioas_map(holder->iommufd, map->id, map->slow, PAGE,
				      SLOW_IOVA, true);
		if (ret)
			give_up("address space", ret);
		map_arena(holder, space);
		atomic_store(&map->mapped, WORD(1, 0, ALIVE));
	}
}

static void open_one(struct holder *holder, struct device *device)
{
	unsigned int i, tries;
	uint32_t tail;
	int ret;

	pthread_mutex_init(&device->lock, NULL);
	pthread_mutex_init(&device->reset_lock, NULL);
	for (i = 0; i <= PASIDS; i++)
		pthread_mutex_init(&device->slots[i].lock, NULL);
	device->fd = device_open(device->uuid);
	if (device->fd < 0)
		give_up("device", device->fd);
	/* The intruder may be in it for a moment */
	for (tries = 0; tries < 5000; tries++) {
		ret = device_bind(device->fd, holder->iommufd);
		if (ret != -EBUSY && ret != -EINVAL)
			break;
		nap(1000);
	}
	if (ret)
		give_up("bind", ret);
	if (list_length(device->uuid))
		complain("device %u: its list is not empty when it is opened",
			 device->number);
	ret = device_register(device->fd, PDMA_REG_TAIL, &tail);
	if (ret != sizeof(tail) || tail)
		complain("device %u: TAIL %u when it is opened", device->number,
			 tail);
	device->tail = 0;
	device->settled = atomic_load(&device->resets);
	device->ring = device_ring(device->fd);
	if (!device->ring)
		give_up("ring", -errno);
}

static void look(struct device *device)
{
	int ret = list_length(chance(2) ? device->uuid : NULL);

	if (ret < 0)
		complain("device %u: the kernel's list: errno %d",
			 device->number, -ret);
	count(LIST);
}

/* Changes what the PASIDs mean, at random */
static void *registering(void *argument)
{
	struct holder *holder = argument;

	seed_thread(20 + holder->number);
	while (!atomic_load(&holder->leave)) {
		struct device *device = &holder->devices[chance(DEVICES)];
		unsigned int pasid = chance(PASIDS + 1), kind = chance(100);
		struct slot *slot = &device->slots[pasid];

		if (kind < 3) {
			ring_reset(device);
		} else if (kind < 8) {
			look(device);
		} else if (!pthread_mutex_trylock(&slot->lock)) {
			if (WORD_STATE(atomic_load(&slot->word)) != ALIVE ||
			    kind < 35)
				slot_attach(holder, device, pasid,
					    chance(SPACES));
			else
				slot_detach(holder, device, pasid);
			pthread_mutex_unlock(&slot->lock);
		}
		if (!chance(4))
			nap(chance(200));
	}
	return NULL;
}

/* Takes memory out of the address spaces and puts it back, and looks at it */
static void *mapping(void *argument)
{
	struct holder *holder = argument;

	seed_thread(50 + holder->number);
	while (!atomic_load(&holder->leave)) {
		unsigned int space = chance(SPACES);
		struct space *map = &holder->spaces[space];
		uint64_t count_;
		int ret;

		nap(chance(3000));
		arena_audit(holder, false, "by work of somebody else's");
		pthread_mutex_lock(&map->lock);
		count_ = WORD_COUNT(map->mapped);
		atomic_store(&map->mapped, WORD(count_ + 1, 0, CHANGING));
		ret = ioas_unmap(holder->iommufd, map->id, IOVA, ARENA);
		if (ret)
			complain("holder %u: unmap: errno %d", holder->number,
				 -ret);
		atomic_store(&map->mapped, WORD(count_ + 2, 0, DEAD));
		nap(chance(400));
		atomic_store(&map->mapped, WORD(count_ + 3, 0, CHANGING));
		map_arena(holder, space);
		atomic_store(&map->mapped, WORD(count_ + 4, 0, ALIVE));
		pthread_mutex_unlock(&map->lock);
		count(REMAP);
	}
	return NULL;
}

/* All is given back one by one, and nothing holds on to anything */
static void give_back(struct holder *holder)
{
	unsigned int i, pasid, space;
	int ret;

	for (i = 0; i < DEVICES; i++) {
		struct device *device = &holder->devices[i];

		for (pasid = 0; pasid <= PASIDS; pasid++)
			if (WORD_STATE(device->slots[pasid].word) == ALIVE)
				slot_detach(holder, device, pasid);
		ret = list_length(device->uuid);
		if (ret)
			complain("device %u: %d in its list when all are detached",
				 device->number, ret);
	}
	for (space = 0; space < SPACES; space++) {
		ret = ioas_destroy(holder->iommufd, holder->spaces[space].id);
		if (ret)
			complain("holder %u: space %u cannot be destroyed: errno %d",
				 holder->number, space, -ret);
	}
	for (i = 0; i < DEVICES; i++) {
		munmap(holder->devices[i].ring, PDMA_RING_SIZE);
		close(holder->devices[i].fd);
	}
	close(holder->iommufd);
}

void hold(struct holder *holder)
{
	pthread_t threads[THREADS], server;
	unsigned int i, started = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	seed_thread(60 + holder->number);
	open_spaces(holder);
	for (i = 0; i < DEVICES; i++)
		open_one(holder, &holder->devices[i]);
	for (i = 0; i < REGISTRARS; i++)
		pthread_create(&threads[started++], NULL, registering, holder);
	for (i = 0; i < DEVICES; i++)
		pthread_create(&threads[started++], NULL, submitting,
			       &holder->devices[i]);
	pthread_create(&threads[started++], NULL, mapping, holder);
	pthread_create(&threads[started++], NULL, probing, holder);
	pthread_create(&server, NULL, serving, holder);
	atomic_store(&holder->up, true);
	while (started--)
		pthread_join(threads[started], NULL);
	atomic_store(&holder->left, true);
	pthread_join(server, NULL);
	if (chance(2))
		give_back(holder);
	atomic_store(&holder->dying, true);
	_exit(0);
}
