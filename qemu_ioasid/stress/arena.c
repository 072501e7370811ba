// SPDX-License-Identifier: GPL-2.0-or-later
/* The arenas behind the address spaces, and what they must hold */
#include <string.h>

#include "stress.h"

/* Nobody may be using the holder's devices */
void arena_paint(struct holder *holder)
{
	unsigned int space;
	size_t i;

	holder->epoch++;
	for (space = 0; space < SPACES; space++) {
		uint64_t *words = (uint64_t *)holder->images[space];
		uint64_t tag = mix((uint64_t)holder->epoch << 16 |
				   holder->number << 8 | space);

		for (i = 0; i < ARENA / sizeof(*words); i++)
			words[i] = mix(tag + i);
		memcpy(holder->arenas[space], words, ARENA);
	}
}

bool arena_intact(struct holder *holder, unsigned int space, unsigned int page)
{
	return !memcmp(holder->arenas[space] + page * PAGE,
		       holder->images[space] + page * PAGE, PAGE);
}

/*
 * No page may have changed that no work of the holder's own may write, or, with
 * @all, none at all: its own lanes are work.c's, which judges what is in them.
 */
void arena_audit(struct holder *holder, bool all, const char *when)
{
	unsigned int own = LANES + holder->number * DEVICES;
	unsigned int space, page;

	for (space = 0; space < SPACES; space++) {
		for (page = 0; page < ARENA_PAGES; page++) {
			if (!all && page >= own && page < own + DEVICES)
				continue;
			if (arena_intact(holder, space, page))
				continue;
			complain("holder %u, space %u: page %u (%s) was written %s",
				 holder->number, space, page,
				 page == SOURCE ? "read only" :
				 page >= LANES && page < LANES + ALL_DEVICES ?
				 "a device's lane" : "not mapped", when);
		}
	}
}

/* What a chunk has of the copy that @desc describes: 0 nothing, 1 all, -1 else */
int chunk_state(struct holder *holder, unsigned int space, unsigned int lane,
		unsigned int chunk, const struct pdma_desc *desc)
{
	size_t at = (LANES + lane) * PAGE + chunk * CHUNK;
	const uint8_t *is = holder->arenas[space] + at;
	const uint8_t *image = holder->images[space] + at;
	size_t into = desc->dst - IOVA - at, from = desc->src - IOVA;

	/* What sleeps is served with the page to read from */
	if (desc->src >= SLOW_IOVA)
		from = desc->src - SLOW_IOVA + SOURCE * PAGE;
	if (!memcmp(is, image, CHUNK))
		return 0;
	if (desc->dst < IOVA + at || into + desc->length > CHUNK)
		return -1;
	if (memcmp(is, image, into) ||
	    memcmp(is + into + desc->length, image + into + desc->length,
		   CHUNK - into - desc->length))
		return -1;
	if (memcmp(is + into, holder->images[space] + from, desc->length))
		return -1;
	return 1;
}

void chunk_restore(struct holder *holder, unsigned int space, unsigned int lane,
		   unsigned int chunk)
{
	size_t at = (LANES + lane) * PAGE + chunk * CHUNK;

	memcpy(holder->arenas[space] + at, holder->images[space] + at, CHUNK);
}
