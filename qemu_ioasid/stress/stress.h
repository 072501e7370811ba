/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Races on pdma, and what must hold meanwhile
 *
 * A controller (stress.c) owns the mdevs and the module, and keeps HOLDERS
 * processes (holder.c) going, which it kills now and then. Each holder has an
 * iommufd of its own, SPACES address spaces and DEVICES devices, which it
 * attaches, replaces, detaches, resets and gives work to, from threads that
 * do not wait for each other (work.c, slow.c).
 *
 * Every address space is backed by an arena: a page to read from, a page to
 * write to for each device there is, whoever holds it (a lane), and pages that
 * are not mapped. All address spaces have the same layout, so that work which
 * goes astray lands in the lane of the device that did it, in an arena where
 * nothing may have written. The arenas outlive the holders: what is written
 * after a holder's death is seen as well. An arena is compared with its image,
 * another one whenever the holder is (a pattern per address space and epoch).
 *
 * What a PASID means to a device is in a slot, whose word changes before and
 * after each call that changes it. Work that began and ended under one word is
 * judged by it; else by all address spaces that the slot named meanwhile.
 */
#ifndef STRESS_H
#define STRESS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <linux/pdma.h>

#define HOLDERS		2
#define DEVICES		2			/* of a holder */
#define ALL_DEVICES	(HOLDERS * DEVICES)
#define SPACES		3			/* of a holder */
#define PASIDS		6			/* 1 to PASIDS, whoever is faster */
#define SPINS		500			/* looks at a record without a pause */
#define OWN		0			/* the slot of work without one */

#define PAGE		4096UL
#define CHUNK		512UL			/* one descriptor's in a lane */
#define BATCH		7			/* the last chunk is slow.c's */
#define SOURCE		1			/* pages of an arena */
#define LANES		3
#define ARENA_PAGES	(LANES + ALL_DEVICES + 1)
#define ARENA		(ARENA_PAGES * PAGE)
#define IOVA		0x100000UL		/* of an arena's first page */
#define SLOW_IOVA	(IOVA + 0x100000UL)	/* the page that sleeps */

enum state { DEAD, ALIVE, CHANGING };

/* A slot's word: how often it changed, the index of a space, a state */
#define WORD(n, space, state)	((uint64_t)(n) << 16 | (space) << 8 | (state))
#define WORD_STATE(word)	((enum state)((word) & 0xff))
#define WORD_SPACE(word)	((unsigned int)((word) >> 8 & 0xff))
#define WORD_COUNT(word)	((word) >> 16)
#define HISTORY			256

struct slot {
	pthread_mutex_t lock;		/* who changes it */
	_Atomic uint64_t word;
	_Atomic uint8_t named[HISTORY];	/* the space of count % HISTORY */
};

struct space {
	uint32_t id;			/* of the IOAS */
	_Atomic uint64_t mapped;	/* as a slot's word; DEAD: unmapped */
	pthread_mutex_t lock;		/* who maps and unmaps */
	uint8_t *slow;			/* the memory at SLOW_IOVA */
	_Atomic unsigned int asleep;	/* accesses of it that began to sleep */
	_Atomic unsigned int woken;
};

struct device {
	char uuid[40];
	unsigned int number;		/* among all */
	int fd;
	uint8_t *ring;
	pthread_mutex_t lock;		/* who submits */
	uint32_t tail;
	pthread_mutex_t reset_lock;
	_Atomic unsigned int resets;	/* odd: one is under way */
	unsigned int settled;		/* the resets that tail is after */
	struct slot slots[PASIDS + 1];
};

enum ending { KILLED, REMOVED, LEFT, ENDINGS };

struct holder {
	unsigned int number;
	pid_t pid;
	int iommufd;
	int uffd;
	unsigned int epoch;
	_Atomic bool up;		/* its threads have begun */
	_Atomic bool leave;		/* all threads end */
	_Atomic bool left;		/* all have, but who serves the sleepers */
	_Atomic bool dying;		/* it will not be long, words are void */
	struct device devices[DEVICES];
	struct space spaces[SPACES];
	uint8_t arenas[SPACES][ARENA] __attribute__((aligned(4096)));
	uint8_t images[SPACES][ARENA];
};

enum count {
	ATTACH, ATTACH_BUSY, REPLACE, REPLACE_BUSY, DETACH, RESET, REMAP, LIST,
	DONE, REFUSED, FAULT, DROPPED, JUDGED, SLEPT,
	START, KILL, REMOVE, LEAVE, INTRUDE, RELOAD, RELOAD_BUSY, COUNTS
};

#define COMPLAINTS	16
#define COMPLAINT	240

struct shared {
	_Atomic bool stop;
	_Atomic unsigned int complaints;
	double started;
	char complaint[COMPLAINTS][COMPLAINT];
	_Atomic unsigned long counts[COUNTS];
	struct holder holders[HOLDERS];
};

extern struct shared *shared;

/* Neighbouring numbers become unlike ones */
static inline uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9;
	x ^= x >> 27;
	x *= 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* stress.c */
double now(void);
unsigned int chance(unsigned int below);
void nap(unsigned int microseconds);
void seed_thread(unsigned int number);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

static inline void count(enum count what)
{
	atomic_fetch_add_explicit(&shared->counts[what], 1,
				  memory_order_relaxed);
}

/* kernel.c: an errno, negated, where something fails */
int open_iommufd(void);
int ioas_alloc(int iommufd, uint32_t *id);
int ioas_destroy(int iommufd, uint32_t id);
int ioas_map(int iommufd, uint32_t id, void *memory, size_t length,
	     uint64_t iova, bool writeable);
int ioas_unmap(int iommufd, uint32_t id, uint64_t iova, size_t length);
int device_open(const char *uuid);
int device_bind(int fd, int iommufd);
int device_attach(int fd, unsigned int pasid, uint32_t ioas);
int device_detach(int fd, unsigned int pasid);
int device_reset(int fd);
uint8_t *device_ring(int fd);
int device_register(int fd, unsigned int offset, uint32_t *value);
int device_doorbell(int fd, uint32_t tail);
int slow_open(void *memory, size_t length);
int slow_wait(int uffd, void **page);
int slow_serve(int uffd, void *page, const void *content);
int mdev_create(const char *uuid);
int mdev_remove(const char *uuid);
int module_load(const char *path);
int module_unload(const char *path);
int list_length(const char *uuid);

/* arena.c */
void arena_paint(struct holder *holder);
bool arena_intact(struct holder *holder, unsigned int space, unsigned int page);
void arena_audit(struct holder *holder, bool all, const char *when);
int chunk_state(struct holder *holder, unsigned int space, unsigned int lane,
		unsigned int chunk, const struct pdma_desc *desc);
void chunk_restore(struct holder *holder, unsigned int space, unsigned int lane,
		   unsigned int chunk);

/* slot.c */
void slot_begin(struct slot *slot, unsigned int space);
void slot_end(struct slot *slot, unsigned int space, enum state state);
bool slot_named(struct slot *slot, uint64_t before, uint64_t after,
		unsigned int space);
int slot_attach(struct holder *holder, struct device *device,
		unsigned int pasid, unsigned int space);
void slot_detach(struct holder *holder, struct device *device,
		 unsigned int pasid);

/* holder.c */
void hold(struct holder *holder) __attribute__((noreturn));

/* work.c */
void *submitting(void *device);
void ring_put(struct device *device, uint32_t count,
	      const struct pdma_desc *desc);
bool ring_done(struct device *device, uint32_t count,
	       struct pdma_completion *done);
void ring_settle(struct device *device);
int ring_reset(struct device *device);
struct holder *holder_of(struct device *device);

/* slow.c */
void *serving(void *holder);
void *probing(void *holder);

#endif /* STRESS_H */
