// SPDX-License-Identifier: GPL-2.0-or-later
/* Work for the devices, and the verdict on what came of it */
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "stress.h"

/* A device is stuck when it does nothing for so long, in seconds */
#define STUCK	60

enum aim { CHUNKS, UNMAPPED, READ_ONLY };

struct job {
	struct pdma_desc desc;
	enum aim aim;
	struct slot *slot;		/* NULL: a PASID nobody ever has */
	uint64_t given, before, after;	/* when submitted, before, after it */
	struct pdma_completion done;
};

struct holder *holder_of(struct device *device)
{
	return &shared->holders[device->number / DEVICES];
}

void ring_put(struct device *device, uint32_t count,
	      const struct pdma_desc *desc)
{
	struct pdma_desc *ring = (void *)(device->ring + PDMA_DESC_OFFSET);

	ring[count % PDMA_RING_ENTRIES] = *desc;
}

bool ring_done(struct device *device, uint32_t count,
	       struct pdma_completion *done)
{
	struct pdma_completion *ring =
		(void *)(device->ring + PDMA_COMPLETION_OFFSET);
	struct pdma_completion *slot = &ring[count % PDMA_RING_ENTRIES];

	if (__atomic_load_n(&slot->seq, __ATOMIC_ACQUIRE) != count + 1)
		return false;
	*done = *slot;
	return true;
}

/* After a reset that somebody made: until it is over, and nothing is under way */
void ring_settle(struct device *device)
{
	double end = now() + STUCK;
	uint32_t head, tail;

	while (now() < end) {
		unsigned int resets = atomic_load(&device->resets);

		if (!(resets & 1) &&
		    device_register(device->fd, PDMA_REG_TAIL, &tail) == 4 &&
		    device_register(device->fd, PDMA_REG_HEAD, &head) == 4 &&
		    head == tail && atomic_load(&device->resets) == resets) {
			device->tail = tail;
			device->settled = resets;
			return;
		}
		nap(50);
	}
	complain("device %u is not idle %u s after a reset", device->number,
		 STUCK);
}

int ring_reset(struct device *device)
{
	int ret;

	pthread_mutex_lock(&device->reset_lock);
	atomic_fetch_add(&device->resets, 1);
	ret = device_reset(device->fd);
	atomic_fetch_add(&device->resets, 1);
	pthread_mutex_unlock(&device->reset_lock);
	if (ret)
		complain("device %u: reset: errno %d", device->number, -ret);
	count(RESET);
	return ret;
}

/* In no space the bytes that are there already: such work could not be told from none */
static bool shows(const struct holder *holder, const struct pdma_desc *desc)
{
	unsigned int space;

	for (space = 0; space < SPACES; space++)
		if (!memcmp(holder->images[space] + (desc->src - IOVA),
			    holder->images[space] + (desc->dst - IOVA),
			    desc->length))
			return false;
	return true;
}

static void place(const struct device *device, struct job *job, unsigned int chunk)
{
	unsigned int lane = LANES + device->number;
	unsigned int length = 1 + chance(CHUNK / 2);

	job->desc.length = length;
	job->desc.src = IOVA + SOURCE * PAGE + chance(PAGE - length);
	job->desc.dst = IOVA + lane * PAGE + chunk * CHUNK +
			chance(CHUNK - length);
	if (job->aim)
		job->desc.dst = IOVA + chance(PAGE - length) +
				(job->aim == READ_ONLY ? SOURCE * PAGE : 0);
}

static void plan(struct device *device, struct job *job, unsigned int chunk)
{
	unsigned int pasid = 1 + chance(PASIDS), kind = chance(20);

	memset(job, 0, sizeof(*job));
	if (kind == 0)
		pasid = OWN;
	else if (kind == 1)
		pasid = chance(2) ? PASIDS + 1 + chance(4) : 1 << 20;
	else if (kind == 2)
		job->aim = UNMAPPED;
	else if (kind == 3)
		job->aim = READ_ONLY;
	if (pasid <= PASIDS)
		job->slot = &device->slots[pasid];
	job->desc.opcode = PDMA_OP_COPY;
	job->desc.flags = pasid == OWN ? 0 : PDMA_DESC_PASID;
	job->desc.pasid = pasid;
	do
		place(device, job, chunk);
	while (!shows(holder_of(device), &job->desc));
}

static const char *told(const struct job *job)
{
	static _Thread_local char text[120];
	static const char * const states[] = { "dead", "alive", "changing" };

	snprintf(text, sizeof(text),
		 "PASID %u (%s, then %s; aim %u): status %u, errno %u",
		 job->desc.pasid,
		 job->slot ? states[WORD_STATE(job->before)] : "nobody's",
		 job->slot ? states[WORD_STATE(job->after)] : "nobody's",
		 job->aim, job->done.status, job->done.error);
	return text;
}

/* Which spaces have the job's bytes; its chunk is as before then in all of them */
static unsigned int collect(struct holder *holder, struct device *device,
			    struct job *job, unsigned int chunk)
{
	unsigned int found = 0, space;

	for (space = 0; space < SPACES; space++) {
		int is = chunk_state(holder, space, device->number, chunk,
				     &job->desc);

		if (!is)
			continue;
		if (is < 0)
			complain("device %u, space %u: foreign bytes, %s",
				 device->number, space, told(job));
		else
			found |= 1 << space;
		chunk_restore(holder, space, device->number, chunk);
		if (is > 0 && (!job->slot ||
			       !slot_named(job->slot, job->before, job->after,
					   space)))
			complain("device %u wrote space %u, which the PASID did not name, %s",
				 device->number, space, told(job));
	}
	if (found & (found - 1))
		complain("device %u wrote several spaces (%#x), %s",
			 device->number, found, told(job));
	return found;
}

/* What must be of work that began and ended under one word */
static const char *settled(const struct job *job, uint64_t before,
			   uint64_t after)
{
	uint32_t status = job->done.status;
	bool own = job->slot && !job->desc.flags;

	if (!job->slot || (WORD_STATE(job->before) == DEAD && !own))
		return status == PDMA_COMPLETION_REFUSED ? NULL :
		       "not registered, and not refused";
	if (WORD_STATE(job->before) == DEAD)
		return status == PDMA_COMPLETION_FAULT ? NULL :
		       "no address space, and no fault";
	if (WORD_STATE(job->before) != ALIVE)
		return NULL;
	if (status == PDMA_COMPLETION_REFUSED)
		return "registered, and refused";
	if (before != after || WORD_STATE(before) == CHANGING)
		return NULL;
	if (WORD_STATE(before) == DEAD || job->aim == UNMAPPED)
		return status == PDMA_COMPLETION_FAULT &&
		       job->done.error == ENOENT ? NULL :
		       "not mapped, and no such fault";
	if (job->aim == READ_ONLY)
		return status == PDMA_COMPLETION_FAULT &&
		       job->done.error == EPERM ? NULL :
		       "read only, and no such fault";
	return status == PDMA_COMPLETION_DONE ? NULL :
	       "registered and mapped, and not done";
}

static void judge(struct holder *holder, struct device *device, struct job *job,
		  unsigned int chunk, uint64_t mapped[SPACES])
{
	unsigned int found = collect(holder, device, job, chunk);
	unsigned int space = WORD_SPACE(job->before);
	const char *wrong = NULL;

	switch (job->done.status) {
	case PDMA_COMPLETION_DONE:
		count(DONE);
		if (job->aim || !found)
			wrong = "done, and nothing written";
		break;
	case PDMA_COMPLETION_REFUSED:
		count(REFUSED);
		if (found || !job->desc.flags)
			wrong = "refused, which cannot be";
		break;
	case PDMA_COMPLETION_FAULT:
		count(FAULT);
		if (job->done.error != ENOENT && job->done.error != EPERM)
			wrong = "no such fault";
		break;
	default:
		wrong = "no such status";
	}
	if (job->done.pasid != job->desc.pasid)
		wrong = wrong ?: "a record that is not of this work";
	if (!job->slot || job->before == job->after) {
		count(JUDGED);
		wrong = wrong ?: settled(job, mapped[space],
					 holder->spaces[space].mapped);
	}
	if (wrong)
		complain("device %u: %s: %s", device->number, wrong, told(job));
}

static uint64_t word(const struct job *job)
{
	return job->slot ? atomic_load(&job->slot->word) : 0;
}

static void stuck(struct device *device, uint32_t at, const struct job *job)
{
	uint32_t tail = 0, head = 0, status = 0;

	device_register(device->fd, PDMA_REG_TAIL, &tail);
	device_register(device->fd, PDMA_REG_HEAD, &head);
	device_register(device->fd, PDMA_REG_STATUS, &status);
	complain("device %u is stuck at %u (TAIL %u, HEAD %u, STATUS %#x), %s",
		 device->number, at, tail, head, status, told(job));
}

/* Looks again and again: the rest of a record is to be there as soon as seq is */
static bool seen(struct device *device, uint32_t count,
		 struct pdma_completion *done)
{
	unsigned int spins;

	for (spins = 0; spins < SPINS; spins++)
		if (ring_done(device, count, done))
			return true;
	return false;
}

/*
 * Wait for each job's end. A device does one after another, so that one cannot
 * have begun while its predecessor was not done. False after a reset.
 */
static bool wait_for(struct device *device, struct job *jobs, unsigned int many,
		     unsigned int resets)
{
	double end = now() + STUCK;
	unsigned int i, turns = 0;

	for (i = 0; i < many; i++) {
		struct job *job = &jobs[i], *next = i + 1 < many ? job + 1 : NULL;
		uint64_t later;

		for (;;) {
			later = next ? word(next) : 0;
			if (seen(device, device->tail + i, &job->done))
				break;
			if (next)
				next->before = later;
			if (atomic_load(&device->resets) != resets)
				return false;
			if (now() > end) {
				stuck(device, device->tail + i, job);
				return false;
			}
			if (++turns < 20)
				sched_yield();
			else
				nap(20);
		}
		job->after = word(job);
	}
	return atomic_load(&device->resets) == resets;
}

static void batch(struct holder *holder, struct device *device)
{
	unsigned int many = 1 + chance(BATCH), i, space, resets;
	uint64_t mapped[SPACES];
	struct job jobs[BATCH];

	/* One that was missed has moved TAIL: more of it could overrun the ring */
	resets = atomic_load(&device->resets);
	if (resets != device->settled) {
		ring_settle(device);
		return;
	}
	for (space = 0; space < SPACES; space++)
		mapped[space] = atomic_load(&holder->spaces[space].mapped);
	for (i = 0; i < many; i++) {
		plan(device, &jobs[i], i);
		ring_put(device, device->tail + i, &jobs[i].desc);
		jobs[i].given = jobs[i].before = word(&jobs[i]);
	}
	device_doorbell(device->fd, device->tail + many);
	if (wait_for(device, jobs, many, resets)) {
		device->tail += many;
		for (i = 0; i < many; i++)
			judge(holder, device, &jobs[i], i, mapped);
	} else {
		/* Some may have been done, some not, and the records are gone */
		ring_settle(device);
		for (i = 0; i < many; i++) {
			jobs[i].before = jobs[i].given;
			jobs[i].after = word(&jobs[i]);
			collect(holder, device, &jobs[i], i);
			count(DROPPED);
		}
	}
	for (space = 0; space < SPACES; space++)
		if (!arena_intact(holder, space, LANES + device->number))
			complain("device %u, space %u: bytes of no work under way",
				 device->number, space);
}

void *submitting(void *argument)
{
	struct device *device = argument;
	struct holder *holder = holder_of(device);

	seed_thread(10 + device->number);
	while (!atomic_load(&holder->leave)) {
		pthread_mutex_lock(&device->lock);
		batch(holder, device);
		pthread_mutex_unlock(&device->lock);
		if (!chance(8))
			nap(chance(300));
	}
	return NULL;
}
