// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The controller: it keeps the holders going, ends them in every way there is,
 * takes their devices and the module from under them, and has the last look.
 *
 *   stress SECONDS SEED MODULE
 *
 * MODULE is the file of a driver that is loaded. Prints one JSON object. Exits
 * with 1 after a complaint, with 2 where it could not begin.
 */
#include <err.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "stress.h"

/* What takes longer hangs, in seconds: a debug kernel on a busy machine is slow */
#define HANGS	90

struct shared *shared;

static _Thread_local uint64_t random_state = 1;
static uint64_t seed;
static const char *module;

/* What the controller knows of a holder */
struct keeping {
	double until;			/* it ends then, or may begin */
	enum ending ending;
	bool up;
	bool ended;			/* by us; it may have died before */
	pid_t remover;
	unsigned int removed;
};

static struct keeping kept[HOLDERS];
static pid_t unloader, intruder;
static double next_reload, next_intruder;

double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

void seed_thread(unsigned int number)
{
	random_state = mix(mix(seed + 1) ^ (uint64_t)getpid() << 20 ^ number);
}

unsigned int chance(unsigned int below)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (random_state >> 11) % below;
}

void nap(unsigned int microseconds)
{
	struct timespec ts = { .tv_nsec = microseconds * 1000L };

	nanosleep(&ts, NULL);
}

void complain(const char *format, ...)
{
	unsigned int number = atomic_fetch_add(&shared->complaints, 1);
	va_list arguments;
	int length;

	atomic_store(&shared->stop, true);
	if (number >= COMPLAINTS)
		return;
	length = snprintf(shared->complaint[number], COMPLAINT, "%.3f s: ",
			  now() - shared->started);
	va_start(arguments, format);
	vsnprintf(shared->complaint[number] + length, COMPLAINT - length,
		  format, arguments);
	va_end(arguments);
	fprintf(stderr, "%s\n", shared->complaint[number]);
}

static struct device *device_at(unsigned int number)
{
	return &shared->holders[number / DEVICES].devices[number % DEVICES];
}

/* A process of ours that does one thing and ends */
static pid_t aside(int (*what)(const char *), const char *argument)
{
	pid_t pid = fork();

	if (pid < 0)
		err(2, "fork");
	if (pid)
		return pid;
	_exit(-what(argument) & 0xff);
}

/* How a process ended: false while it has not */
static bool ended(pid_t *pid, int *status)
{
	if (!*pid || waitpid(*pid, status, WNOHANG) != *pid)
		return false;
	*pid = 0;
	return true;
}

static int await(pid_t *pid, const char *what)
{
	double end = now() + HANGS;
	int status;

	while (*pid && !ended(pid, &status)) {
		if (now() > end) {
			complain("%s is not over after %u s", what, HANGS);
			kill(*pid, SIGKILL);
			*pid = 0;
			return -1;
		}
		nap(1000);
	}
	return status;
}

/* Opens devices that are others', and takes what is nobody's for a moment */
static int intrude(const char *argument)
{
	seed_thread(70);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (!atomic_load(&shared->stop)) {
		struct device *device = device_at(chance(ALL_DEVICES));
		unsigned int pasid = 1 + chance(PASIDS);
		int fd = device_open(device->uuid), iommufd, ret;
		uint32_t ioas;

		nap(chance(3000));
		if (fd < 0)
			continue;
		ret = device_attach(fd, pasid, 1);
		if (ret != -EINVAL && ret != -ENODEV)
			complain("attach to a file that is not bound: errno %d",
				 -ret);
		iommufd = open_iommufd();
		if (!device_bind(fd, iommufd) && !ioas_alloc(iommufd, &ioas)) {
			ret = device_attach(fd, pasid, ioas);
			if (ret && ret != -EBUSY)
				complain("intruder: attach: errno %d", -ret);
		}
		close(iommufd);
		close(fd);
		count(INTRUDE);
	}
	return argument ? 1 : 0;
}

static void void_words(struct holder *holder)
{
	unsigned int i, pasid;

	for (i = 0; i < DEVICES; i++) {
		struct device *device = &holder->devices[i];

		atomic_store(&device->resets, 0);
		for (pasid = 0; pasid <= PASIDS; pasid++)
			slot_end(&device->slots[pasid], 0, DEAD);
	}
}

static void begin(struct holder *holder, struct keeping *keeping)
{
	pid_t pid;

	void_words(holder);
	atomic_store(&holder->up, false);
	atomic_store(&holder->leave, false);
	atomic_store(&holder->left, false);
	atomic_store(&holder->dying, false);
	keeping->ending = chance(ENDINGS);
	keeping->ended = false;
	keeping->up = false;
	/* Some do not get so far */
	keeping->until = now() + (chance(10) ? HANGS : chance(1000) / 5000.);
	pid = fork();
	if (pid < 0)
		err(2, "fork");
	if (!pid)
		hold(holder);
	holder->pid = pid;
	count(START);
}

static void end(struct holder *holder, struct keeping *keeping)
{
	keeping->until = now() + HANGS;
	keeping->ended = true;
	if (keeping->ending == LEFT) {
		count(LEAVE);
		atomic_store(&holder->leave, true);
		return;
	}
	if (keeping->ending == REMOVED) {
		keeping->removed = holder->number * DEVICES + chance(DEVICES);
		keeping->remover = aside(mdev_remove,
					 device_at(keeping->removed)->uuid);
		nap(chance(20000));
		count(REMOVE);
	} else {
		count(KILL);
	}
	atomic_store(&holder->dying, true);
	kill(holder->pid, SIGKILL);
}

/* What was registered on a device is gone soon after its holder */
static void wait_empty(struct device *device)
{
	double until = now() + HANGS;

	while (list_length(device->uuid) > 0) {
		if (intruder) {
			kill(intruder, SIGKILL);
			await(&intruder, "the intruder's death");
		}
		if (now() > until) {
			complain("device %u: %d in its list %u s after its holder's death",
				 device->number, list_length(device->uuid),
				 HANGS);
			return;
		}
		nap(1000);
	}
}

/* Its devices have forgotten it, and nothing of it writes any more */
static void bury(struct holder *holder, struct keeping *keeping, int status)
{
	unsigned int i;

	holder->pid = 0;
	if (WIFEXITED(status) ? WEXITSTATUS(status) == 1 :
	    WTERMSIG(status) != SIGKILL)
		complain("holder %u ended with status %#x", holder->number,
			 status);
	if (!keeping->ended)
		keeping->ending = KILLED;
	if (keeping->remover && await(&keeping->remover, "removal of an mdev"))
		keeping->ending = KILLED;	/* the module went first */
	arena_audit(holder, false, "by work of somebody else's");
	/* Work that sleeps keeps the memory, and that the device file */
	for (i = 0; i < DEVICES; i++)
		wait_empty(&holder->devices[i]);
	arena_paint(holder);
	nap(chance(20000));
	arena_audit(holder, true, "after its holder's death");
	if (keeping->ending == REMOVED) {
		int ret = mdev_create(device_at(keeping->removed)->uuid);

		if (ret && ret != -ENOENT)
			complain("mdev again: errno %d", -ret);
		keeping->ending = KILLED;
	}
	keeping->until = now() + chance(30000) / 1e6;
}

static void tend_holder(struct holder *holder, struct keeping *keeping,
			bool may_begin)
{
	int status;

	if (!holder->pid) {
		if (may_begin && now() > keeping->until)
			begin(holder, keeping);
	} else if (waitpid(holder->pid, &status, WNOHANG) == holder->pid) {
		bury(holder, keeping, status);
	} else if (!keeping->up && !keeping->ended &&
		   atomic_load(&holder->up)) {
		keeping->up = true;
		keeping->until = now() + chance(1000) / (chance(3) ? 1000. : 300.);
	} else if (now() > keeping->until) {
		if (keeping->ended) {
			complain("holder %u does not end within %u s",
				 holder->number, HANGS);
			keeping->until = now() + HANGS;
		} else {
			end(holder, keeping);
		}
	}
}

static void tend_intruder(void)
{
	if (now() < next_intruder)
		return;
	next_intruder = now() + 0.3 + chance(1000) / 1000.;
	if (!intruder) {
		intruder = aside(intrude, NULL);
	} else {
		kill(intruder, SIGKILL);
		await(&intruder, "the intruder's death");
	}
}

static void load(void)
{
	unsigned int i;
	int ret = module_load(module);

	if (ret)
		complain("the module cannot be loaded: errno %d", -ret);
	for (i = 0; i < ALL_DEVICES; i++) {
		ret = mdev_create(device_at(i)->uuid);
		if (ret)
			complain("mdev %u: errno %d", i, -ret);
	}
}

/* Every now and then the module is unloaded; true while there is none */
static bool tend_module(bool *gone)
{
	bool idle = true;
	int status;
	unsigned int i;

	for (i = 0; i < HOLDERS; i++)
		idle = idle && !shared->holders[i].pid;
	if (ended(&unloader, &status)) {
		*gone = !WEXITSTATUS(status);
		count(*gone ? RELOAD : RELOAD_BUSY);
		if (!*gone && WEXITSTATUS(status) != EWOULDBLOCK &&
		    WEXITSTATUS(status) != EBUSY)
			complain("unload: errno %d", WEXITSTATUS(status));
	}
	if (*gone && idle) {
		load();
		*gone = false;
	}
	if (unloader || *gone || now() < next_reload)
		return *gone;
	/* Now with everybody in it, now with nobody, and then just as they come */
	if (idle || !chance(4000)) {
		unloader = aside(module_unload, module);
		next_reload = now() + 0.5 + chance(2000) / 1000.;
	}
	return false;
}

static void finish(void)
{
	unsigned int i;
	bool gone = false;
	int ret;

	atomic_store(&shared->stop, true);
	if (intruder)
		kill(intruder, SIGKILL);
	await(&intruder, "the intruder's death");
	await(&unloader, "the unload");
	for (i = 0; i < HOLDERS; i++) {
		struct holder *holder = &shared->holders[i];

		if (holder->pid && !kept[i].ended) {
			kept[i].ending = LEFT;
			end(holder, &kept[i]);
		}
	}
	for (i = 0; i < HOLDERS; i++) {
		double until = now() + HANGS;

		while (shared->holders[i].pid && now() < until) {
			tend_holder(&shared->holders[i], &kept[i], false);
			nap(1000);
		}
	}
	gone = list_length(NULL) == -ENOENT;
	if (!gone && list_length(NULL))
		complain("%d in the parent's table when all have ended",
			 list_length(NULL));
	for (i = 0; i < ALL_DEVICES && !gone; i++) {
		ret = mdev_remove(device_at(i)->uuid);
		if (ret && ret != -ENOENT)
			complain("mdev %u is not removed: errno %d", i, -ret);
	}
	ret = gone ? 0 : module_unload(module);
	if (ret)
		complain("the module is in use when all have ended: errno %d",
			 -ret);
	else if ((ret = module_load(module)))
		complain("the module cannot be loaded: errno %d", -ret);
}

static void report(double seconds)
{
	static const char * const names[COUNTS] = {
		[ATTACH] = "attach", [ATTACH_BUSY] = "attach_busy",
		[REPLACE] = "replace", [REPLACE_BUSY] = "replace_busy",
		[DETACH] = "detach", [RESET] = "reset", [REMAP] = "remap",
		[LIST] = "list", [DONE] = "done", [REFUSED] = "refused",
		[FAULT] = "fault", [DROPPED] = "dropped", [JUDGED] = "judged",
		[SLEPT] = "slept", [START] = "start", [KILL] = "kill",
		[REMOVE] = "remove", [LEAVE] = "leave", [INTRUDE] = "intrude",
		[RELOAD] = "reload", [RELOAD_BUSY] = "reload_busy",
	};
	unsigned int i, many = atomic_load(&shared->complaints);

	printf("{\"seconds\": %.1f, \"seed\": %lu, \"counts\": {", seconds,
	       (unsigned long)seed);
	for (i = 0; i < COUNTS; i++)
		printf("%s\"%s\": %lu", i ? ", " : "", names[i],
		       atomic_load(&shared->counts[i]));
	printf("}, \"complaints\": [");
	for (i = 0; i < many && i < COMPLAINTS; i++)
		printf("%s\"%s\"", i ? ", " : "", shared->complaint[i]);
	printf("], \"many\": %u}\n", many);
}

static void prepare(void)
{
	unsigned int i, j;

	for (i = 0; i < HOLDERS; i++) {
		struct holder *holder = &shared->holders[i];

		holder->number = i;
		arena_paint(holder);
		for (j = 0; j < DEVICES; j++) {
			struct device *device = &holder->devices[j];

			device->number = i * DEVICES + j;
			snprintf(device->uuid, sizeof(device->uuid),
				 "5712e550-0000-4000-8000-%012x",
				 device->number);
			if (mdev_create(device->uuid))
				errx(2, "mdev %s cannot be created",
				     device->uuid);
		}
	}
}

int main(int argc, char **argv)
{
	double seconds, end;
	bool gone = false;
	unsigned int i;

	if (argc != 4 || (seconds = atof(argv[1])) <= 0) {
		fputs("usage: stress SECONDS SEED MODULE\n", stderr);
		return 2;
	}
	seed = strtoul(argv[2], NULL, 10);
	module = argv[3];
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		err(2, "memory");
	seed_thread(0);
	prepare();
	shared->started = now();
	end = shared->started + seconds;
	next_reload = shared->started + 1;
	while (now() < end && !atomic_load(&shared->stop)) {
		/* Nobody begins: an unload is due, which finds nobody */
		bool may_begin = !tend_module(&gone) &&
				 (unloader || now() < next_reload);

		for (i = 0; i < HOLDERS; i++)
			tend_holder(&shared->holders[i], &kept[i], may_begin);
		tend_intruder();
		nap(500);
	}
	seconds = now() - shared->started;
	finish();
	report(seconds);
	return atomic_load(&shared->complaints) ? 1 : 0;
}
