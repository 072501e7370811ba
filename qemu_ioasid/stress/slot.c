// SPDX-License-Identifier: GPL-2.0-or-later
/* What a PASID means to a device: the calls that change it, and the record */
#include <errno.h>

#include "stress.h"

void slot_begin(struct slot *slot, unsigned int space)
{
	uint64_t count = WORD_COUNT(atomic_load(&slot->word)) + 1;

	atomic_store(&slot->named[count % HISTORY], space);
	atomic_store(&slot->word, WORD(count, space, CHANGING));
}

void slot_end(struct slot *slot, unsigned int space, enum state state)
{
	uint64_t count = WORD_COUNT(atomic_load(&slot->word)) + 1;

	atomic_store(&slot->named[count % HISTORY], space);
	atomic_store(&slot->word, WORD(count, space, state));
}

/* Whether a slot may have named a space at some time between two words */
bool slot_named(struct slot *slot, uint64_t before, uint64_t after,
		unsigned int space)
{
	uint64_t count = WORD_COUNT(before), first;

	if (before == after && WORD_STATE(before) != CHANGING)
		return WORD_STATE(before) == ALIVE && WORD_SPACE(before) == space;
	/* A change is from the space before it */
	if (WORD_STATE(before) == CHANGING)
		count--;
	for (first = count; count <= WORD_COUNT(after); count++)
		if (atomic_load(&slot->named[count % HISTORY]) == space)
			return true;
	/* What has changed since may be where that was: then nobody can tell */
	return WORD_COUNT(atomic_load(&slot->word)) + 1 - first >= HISTORY;
}

/* Rule 5: what another iommufd has registered meanwhile, all the time, it has */
static bool others_have(struct holder *holder, unsigned int pasid,
			uint64_t words[ALL_DEVICES], bool again)
{
	bool found = false;
	unsigned int i;

	for (i = 0; i < ALL_DEVICES; i++) {
		struct holder *other = &shared->holders[i / DEVICES];
		struct slot *slot = &other->devices[i % DEVICES].slots[pasid];
		uint64_t word = atomic_load(&slot->word);

		if (other == holder)
			continue;
		if (again && words[i] == word && WORD_STATE(word) == ALIVE &&
		    !atomic_load(&other->dying))
			found = true;
		words[i] = word;
	}
	return found;
}

/* Attach, or replace; the caller has the slot's lock */
int slot_attach(struct holder *holder, struct device *device,
		unsigned int pasid, unsigned int space)
{
	struct slot *slot = &device->slots[pasid];
	uint64_t before = atomic_load(&slot->word);
	bool replace = WORD_STATE(before) == ALIVE;
	uint64_t others[ALL_DEVICES];
	int ret;

	others_have(holder, pasid, others, false);
	slot_begin(slot, space);
	ret = device_attach(device->fd, pasid, holder->spaces[space].id);
	if (!ret && pasid != OWN && others_have(holder, pasid, others, true))
		complain("PASID %u was attached by holder %u while the other had it",
			 pasid, holder->number);
	if (ret)
		slot_end(slot, WORD_SPACE(before), WORD_STATE(before));
	else
		slot_end(slot, space, ALIVE);
	if (ret && (ret != -EBUSY || pasid == OWN))
		complain("%s of PASID %u: errno %d",
			 replace ? "replace" : "attach", pasid, -ret);
	count(replace ? ret ? REPLACE_BUSY : REPLACE :
	      ret ? ATTACH_BUSY : ATTACH);
	return ret;
}

/* As slot_attach() */
void slot_detach(struct holder *holder, struct device *device,
		 unsigned int pasid)
{
	struct slot *slot = &device->slots[pasid];
	unsigned int space = WORD_SPACE(atomic_load(&slot->word));
	int ret;

	slot_begin(slot, space);
	ret = device_detach(device->fd, pasid);
	slot_end(slot, space, DEAD);
	if (ret)
		complain("holder %u: detach of PASID %u: errno %d",
			 holder->number, pasid, -ret);
	count(DETACH);
}
