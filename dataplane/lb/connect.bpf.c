// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The socket half of the load balancer: connect(2) to a Service address becomes a connect(2) to one of its backends.
// dataplane/README.md draws the packet's way; lb.go, word.go and sync.go write the maps that are read here.

#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_helpers.h>

// A frontend is the key of services. Eight bytes without padding, so that a preallocated element with its value fills
// one cache line (48 bytes of struct htab_elem, 8 of key, 8 of value).
struct frontend {
	__be32 address;
	__be16 port;
	__u8 protocol;
	__u8 scope; // 0: from inside the cluster
};

// A service is one word, {base:32, count:16, owner:16}: its backends are backends[base] to backends[base + count - 1].
// It is one word because an update must be seen whole.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct frontend);
	__type(value, __u64);
	__uint(max_entries, 1 << 16);
} services SEC(".maps");

// A backend is one word, {address:32, port:16, owner:16}; the address and the port are in network byte order.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_MMAPABLE);
} backends SEC(".maps");

// owner_of gives the 16 bits that mark what belongs to a frontend. Both words carry them.
static __always_inline __u16 owner_of(const struct frontend *frontend)
{
	return (*(const __u64 *)frontend * 0x9e3779b97f4a7c15ULL) >> 48;
}

// Each round is one look at a state that may be changing. Two rounds are rare, four are never seen.
#define ROUNDS 4

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	// ctx->protocol is 262 for MPTCP, which in eight bits is TCP, as it should be.
	struct frontend frontend __attribute__((aligned(8))) = {
		.address = ctx->user_ip4,
		.port = ctx->user_port,
		.protocol = ctx->protocol,
	};
	__u16 owner = owner_of(&frontend);

#pragma unroll
	for (int round = 0; round < ROUNDS; round++) {
		__u64 *service = bpf_map_lookup_elem(&services, &frontend);
		if (!service)
			return 1; // not a Service: connect goes on as it was asked for

		// Subtle: read once. A replaced hash element is recycled at once, so the pointer may by now show the
		// word of another frontend; its owner tells.
		__u64 word = *(volatile __u64 *)service;
		if ((__u16)word != owner)
			continue;

		__u32 count = (word >> 16) & 0xffff;
		if (!count)
			break;

		// Multiplying high is uniform to within count / 2^32 and spares the division of random % count.
		__u32 index = word >> 32;
		if (count > 1)
			index += ((__u64)bpf_get_prandom_u32() * count) >> 32;

		__u64 *slot = bpf_map_lookup_elem(&backends, &index);
		if (!slot)
			continue;

		// Subtle: read once. A region that was given to another frontend since the word was read shows by its owner.
		__u64 backend = *(volatile __u64 *)slot;
		if ((__u16)backend != owner)
			continue;

		ctx->user_ip4 = backend >> 32;
		ctx->user_port = (backend >> 16) & 0xffff;
		return 1;
	}

	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

char __license[] SEC("license") = "Dual BSD/GPL";
