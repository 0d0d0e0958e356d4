// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// What the socket hooks cannot do: sending on a connected UDP socket asks none of them, and so it would stay on a backend that is gone.

#include "flows.h"

// What is looked at of a UDP socket, as in include/net/sock.h and net/ipv4/udp.c.
struct in6_addr___kernel {
	union {
		__u32 u6_addr32[4];
	} in6_u;
} __attribute__((preserve_access_index));

struct sock_common {
	__be32 skc_daddr;
	__be16 skc_dport;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct in6_addr___kernel skc_v6_daddr;
} __attribute__((preserve_access_index));

struct udp_sock;

struct bpf_iter__udp {
	void *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

// Linux 6.5 or newer.
extern int bpf_sock_destroy(struct sock_common *) __ksym;

#define STATE_CONNECTED 1 // TCP_ESTABLISHED
#define FAMILY_IPV6 10	  // AF_INET6

// has_left tells whether a socket's peer is a backend that none of its flows may keep.
static __always_inline int has_left(struct flows *flows, const __u64 *peer)
{
	int was_translated = 0;

	for (__u32 i = 0; i < FLOWS; i++) {
		struct flow flow;

		bpf_spin_lock(&flows->lock);
		flow = flows->flows[i];
		bpf_spin_unlock(&flows->lock);
		if (!is_from(flow.key, flow.choice.backend, peer))
			continue;
		if (flow.key[1] | flow.key[2] ? keeps(&services6, &backends6, KEY6, &flow)
					      : keeps(&services4, &backends4, KEY4, &flow))
			return 0;
		was_translated = 1;
	}
	return was_translated;
}

// forsake looks at a UDP socket, and ends what it is connected to if that is a backend that its Service does not have any more.
// forsake.go says what its owner sees.
//
// Subtle: a socket that is not connected asks with each datagram, and is left alone.
SEC("iter/udp")
int forsake(struct bpf_iter__udp *ctx)
{
	struct sock_common *socket = (struct sock_common *)ctx->udp_sk;

	if (!socket || socket->skc_state != STATE_CONNECTED)
		return 0;
	struct flows *flows = bpf_sk_storage_get(&datagrams, (void *)socket, NULL, 0);
	if (!flows)
		return 0;
	__u64 peer[KEY6] = { (__u64)socket->skc_daddr << 32 | (__u64)socket->skc_dport << 16 };
	if (socket->skc_family == FAMILY_IPV6) {
		union address6 address = {
			.parts = { socket->skc_v6_daddr.in6_u.u6_addr32[0], socket->skc_v6_daddr.in6_u.u6_addr32[1],
				   socket->skc_v6_daddr.in6_u.u6_addr32[2], socket->skc_v6_daddr.in6_u.u6_addr32[3] },
		};
		if (is_mapped(&address)) {
			peer[0] = (__u64)address.parts[3] << 32 | (__u64)socket->skc_dport << 16;
		} else {
			peer[0] = (__u64)socket->skc_dport << 16;
			peer[1] = address.words[0];
			peer[2] = address.words[1];
		}
	}
	if (has_left(flows, peer))
		bpf_sock_destroy(socket);
	return 0;
}

char __license[] SEC("license") = "Dual BSD/GPL";
