// SPDX-License-Identifier: GPL-2.0-or-later
/* Work that sleeps in memory of ours, and what must wait for it */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "stress.h"

#define ASLEEP	60		/* seconds, until an access sleeps */

enum act { DETACHES, REPLACES, RESETS, DIES, WATCHES, ACTS };

/* Serves the pages that accesses sleep on, after a while */
void *serving(void *argument)
{
	struct holder *holder = argument;
	void *page;

	seed_thread(30 + holder->number);
	while (!atomic_load(&holder->left)) {
		unsigned int space;
		int ret;

		if (!slow_wait(holder->uffd, &page))
			continue;
		for (space = 0; space < SPACES; space++)
			if (holder->spaces[space].slow == page)
				break;
		if (space == SPACES) {
			complain("an access sleeps on a page of nobody's");
			continue;
		}
		atomic_fetch_add(&holder->spaces[space].asleep, 1);
		nap(chance(4) ? chance(3000) : chance(30000));
		atomic_fetch_add(&holder->spaces[space].woken, 1);
		do {
			ret = slow_serve(holder->uffd, page,
					 holder->images[space] + SOURCE * PAGE);
		} while (ret == -EAGAIN);
		count(SLEPT);
	}
	return NULL;
}

static bool wait_asleep(struct device *device, struct space *space,
			unsigned int asleep, unsigned int resets)
{
	double end = now() + ASLEEP;

	while (atomic_load(&space->asleep) == asleep) {
		if (atomic_load(&device->resets) != resets)
			return false;
		if (now() > end) {
			complain("device %u: no access sleeps after %u s",
				 device->number, ASLEEP);
			return false;
		}
		nap(20);
	}
	return true;
}

/* Does what must not be over before the access is; 0 where it was done */
static int act(struct holder *holder, struct device *device,
	       unsigned int pasid, enum act what, unsigned int space)
{
	switch (what) {
	case DETACHES:
		slot_detach(holder, device, pasid);
		return 0;
	case REPLACES:
		return slot_attach(holder, device, pasid, (space + 1) % SPACES);
	case RESETS:
		return ring_reset(device);
	case DIES:
		if (chance(20))
			return -1;
		atomic_store(&holder->dying, true);
		kill(getpid(), SIGKILL);
		return -1;
	default:
		return -1;
	}
}

static void check(struct holder *holder, struct device *device,
		  const struct pdma_desc *desc, unsigned int space,
		  unsigned int resets, bool over)
{
	struct pdma_completion done = { .status = PDMA_COMPLETION_DONE };
	bool reset, here;
	double end = now() + ASLEEP;
	int is;

	do {
		here = ring_done(device, device->tail, &done);
		reset = atomic_load(&device->resets) != resets;
		if (over && !here && !reset)
			complain("device %u: PASID %u is gone, and its work is not over",
				 device->number, desc->pasid);
	} while (!here && !reset && !over && now() < end);
	if (reset)
		ring_settle(device);
	else if (here && done.status != PDMA_COMPLETION_DONE)
		complain("device %u, PASID %u: status %u, errno %u of work that slept",
			 device->number, desc->pasid, done.status, done.error);
	if (!reset)
		device->tail++;
	is = chunk_state(holder, space, device->number, BATCH, desc);
	if (desc->dst < SLOW_IOVA && is != 1 && !reset)
		complain("device %u, PASID %u: what slept was not written (%d)",
			 device->number, desc->pasid, is);
	chunk_restore(holder, space, device->number, BATCH);
}

static void probe(struct holder *holder, struct device *device,
		  unsigned int pasid)
{
	static const char * const names[] = { "detach", "replace", "reset" };
	unsigned int space = WORD_SPACE(atomic_load(&device->slots[pasid].word));
	struct space *slow = &holder->spaces[space];
	unsigned int asleep = atomic_load(&slow->asleep);
	unsigned int woken = atomic_load(&slow->woken);
	unsigned int resets = atomic_load(&device->resets);
	uint64_t chunk = IOVA + (LANES + device->number) * PAGE + BATCH * CHUNK;
	bool writes = chance(2);
	struct pdma_desc desc = {
		.opcode = PDMA_OP_COPY,
		.flags = PDMA_DESC_PASID,
		.pasid = pasid,
		.length = CHUNK / 2,
		.src = writes ? IOVA + SOURCE * PAGE : SLOW_IOVA,
		.dst = writes ? SLOW_IOVA : chunk,
	};
	enum act what = chance(ACTS);
	bool over = false;

	if (resets != device->settled)
		return;
	ring_put(device, device->tail, &desc);
	device_doorbell(device->fd, device->tail + 1);
	if (wait_asleep(device, slow, asleep, resets) &&
	    !act(holder, device, pasid, what, space)) {
		if (atomic_load(&slow->woken) == woken)
			complain("device %u: %s of PASID %u is over while its work sleeps",
				 device->number, names[what], pasid);
		over = what == DETACHES;
	}
	check(holder, device, &desc, space, resets, over);
	madvise(slow->slow, PAGE, MADV_DONTNEED);
}

void *probing(void *argument)
{
	struct holder *holder = argument;

	seed_thread(40 + holder->number);
	while (!atomic_load(&holder->leave)) {
		struct device *device = &holder->devices[chance(DEVICES)];
		unsigned int pasid = 1 + chance(PASIDS), space = chance(SPACES);
		struct slot *slot = &device->slots[pasid];
		struct space *map = &holder->spaces[space];

		nap(chance(4000));
		pthread_mutex_lock(&slot->lock);
		if (WORD_STATE(atomic_load(&slot->word)) == DEAD)
			slot_attach(holder, device, pasid, space);
		space = WORD_SPACE(atomic_load(&slot->word));
		map = &holder->spaces[space];
		if (WORD_STATE(atomic_load(&slot->word)) == ALIVE) {
			pthread_mutex_lock(&map->lock);
			pthread_mutex_lock(&device->lock);
			probe(holder, device, pasid);
			pthread_mutex_unlock(&device->lock);
			pthread_mutex_unlock(&map->lock);
		}
		pthread_mutex_unlock(&slot->lock);
	}
	return NULL;
}
