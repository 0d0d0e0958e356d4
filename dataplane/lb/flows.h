// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// What UDP sockets remember.

#include "services.h"

// Flows are the last that a UDP socket began. Each goes on to its backend while the Service has that. Of a socket that talks to
// more Services at a time than there is room for, answers to the oldest come from its backend.
#define FLOWS 8

struct flows {
	struct bpf_spin_lock lock; // threads may share the socket
	__u32 next;                // counts flows; the oldest is replaced
	__u32 last;                // the flow that was sent to last
	struct flow flows[FLOWS];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct flows);
} datagrams SEC(".maps");

// A linger is a backend that a frontend gives to no new flow, but leaves to those that have it, as one that terminates and serves still.
struct linger {
	__u64 key[KEY6];
	__u64 backend[KEY6]; // without an owner
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct linger);
	__type(value, __u8);
	__uint(max_entries, 1 << 16);
} lingering SEC(".maps");

static __always_inline int lingers(const struct flow *flow)
{
	struct linger linger;

	copy(linger.key, flow->key);
	copy(linger.backend, flow->choice.backend);
	linger.backend[0] &= ~0xffffULL;
	return bpf_map_lookup_elem(&lingering, &linger) != NULL;
}

// keeps tells whether a flow's backend is one of its frontend's still, or lingers there.
//
// Subtle: that the service word is the same does not say that the backends are. After two changes it may be the one of before.
static __always_inline int keeps(void *services, void *backends, int words, struct flow *flow)
{
	const __u64 *entry = find(services, flow->key, words, hash_of(flow->key, words));
	if (!entry)
		return 0;
	__u64 service = READ_ONCE(entry[words]);
	if (service == flow->choice.service) {
		__u64 backend[KEY6] = {};

		if (read_backend(backends, entry, words, flow->choice.index, backend) && same(backend, flow->choice.backend))
			return 1;
	}
	flow->choice.service = service;
	if (has(words, entry, service, flow))
		return 1;
	// Subtle: where the backend was found before, what is left of a former set may stand still.
	flow->choice.service = 0;
	return lingers(flow);
}

// is_from tells whether what was sent to a frontend went to the backend that has this peer's address; a peer has no owner.
static __always_inline int is_from(const __u64 *key, const __u64 *backend, const __u64 *peer)
{
	return key[0] && backend[0] >> 16 == peer[0] >> 16 && backend[1] == peer[1] && backend[2] == peer[2];
}
