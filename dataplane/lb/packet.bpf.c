// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The packet half of the load balancer: the first packet of a connection to a Service that arrives at a device, from a client
// that no socket hook has seen, is given a backend here. Its connection becomes an entry of conntrack with NAT to the backend,
// and the kernel's NAT does the rest to this packet, those that follow and those that come back. nat.go keeps its hooks alive.

#include "services.h"

#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

// What a program at a device answers (Linux 6.6, include/uapi/linux/bpf.h).
#define TCX_NEXT -1
#define TCX_DROP 2

// What newer kernels than the compiler's headers know.
#define FIB_LOOKUP_SKIP_NEIGH (1U << 2) // Linux 6.3
#define FIB_LOOKUP_SRC (1U << 4)	// Linux 6.7

// What conntrack's functions take, as in net/netfilter/nf_conntrack_bpf.c, net/netfilter/nf_nat_bpf.c and
// include/uapi/linux/netfilter.h. They exist since Linux 6.1.
struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

union nf_inet_addr {
	__u32 all[4];
};

enum nf_nat_manip_type {
	NF_NAT_MANIP_SRC,
	NF_NAT_MANIP_DST,
};

struct ip_ct_tcp {
	__u8 state;
} __attribute__((preserve_access_index));

union nf_conntrack_proto {
	struct ip_ct_tcp tcp;
} __attribute__((preserve_access_index));

struct nf_conn {
	unsigned long status;
	union nf_conntrack_proto proto;
} __attribute__((preserve_access_index));

struct nf_conn___init {
	struct nf_conn ct;
};

extern struct nf_conn___init *bpf_skb_ct_alloc(struct __sk_buff *, struct bpf_sock_tuple *, __u32, struct bpf_ct_opts *, __u32) __ksym;
extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *, struct bpf_sock_tuple *, __u32, struct bpf_ct_opts *, __u32) __ksym;
extern struct nf_conn *bpf_ct_insert_entry(struct nf_conn___init *) __ksym;
extern int bpf_ct_set_nat_info(struct nf_conn___init *, union nf_inet_addr *, int, enum nf_nat_manip_type) __ksym;
extern void bpf_ct_set_timeout(struct nf_conn___init *, __u32) __ksym;
extern int bpf_ct_change_timeout(struct nf_conn *, __u32) __ksym;
extern void bpf_ct_release(struct nf_conn *) __ksym;

#define THIS_NETNS -1		    // BPF_F_CURRENT_NETNS
#define DIR_ORIGINAL 0		    // IP_CT_DIR_ORIGINAL
#define STATUS_DST_NAT (1UL << 5)   // IPS_DST_NAT
#define TCP_STATE_TIME_WAIT 7	    // TCP_CONNTRACK_TIME_WAIT
#define TCP_STATE_CLOSE 8	    // TCP_CONNTRACK_CLOSE
#define NEW_TIMEOUT_MS (5 * 1000) // until conntrack sees the packet, which a rule may drop before, and sets its own
#define ANY_PORT 0		    // the source port, if that can be

// The mark of a packet that begins an association of SCTP: these bits, and where its backend is in the backends map.
#define SCTP_MARK 0x60000000
#define SCTP_MASQUERADE 0x10000000

// Prefixes of addresses, those of IPv4 mapped into IPv6.
struct prefix {
	__u32 length;
	__u32 address[4];
};

// Where clients inside the cluster are.
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u8);
	__uint(max_entries, 1 << 10);
} insiders SEC(".maps");

// Where the cluster's Services have their addresses.
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u8);
	__uint(max_entries, 1 << 10);
} cluster_ips SEC(".maps");

// The addresses of the Services that there are.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, union address6);
	__type(value, __u8);
	__uint(max_entries, 1 << 16);
} addresses SEC(".maps");

__u32 loop_device; // where packets that go to the loop arrive: an index, which may change
#define LOOP_MAC { 2, 'p', 'l', 'i', 'm', 's' }

// A packet is what its headers say.
struct packet {
	union address6 source, destination;
	__be16 ports[2]; // source, destination
	__u8 protocol;
	__u8 is_ipv6;
	__u8 tos;
	__u8 is_echo; // ICMP that asks for an echo
	__u32 end;    // what is behind it is no part of the packet, but padding of Ethernet
};

#define FRAGMENT_OFFSET 0x1fff
#define VLAN_ID 0xfff
#define SCTP_INIT 1 // the chunk that begins an association
#define ICMP_ECHO 8
#define ICMPV6_ECHO_REQUEST 128
#define EXTENSIONS 6 // headers of IPv6 that are looked through

static __always_inline int load(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	return bpf_skb_load_bytes_relative(skb, offset, to, size, BPF_HDR_START_NET) == 0;
}

static __always_inline union address6 mapped(__be32 address)
{
	union address6 all = { .parts = { 0, 0, bpf_htonl(0xffff), address } };

	return all;
}

// load_of loads what is of a packet.
static __always_inline int load_of(struct __sk_buff *skb, const struct packet *packet, __u32 offset, void *to, __u32 size)
{
	return offset + size <= packet->end && load(skb, offset, to, size);
}

// read_transport reads what is behind the headers of IP. It returns false for what belongs to no Service.
static __always_inline int read_transport(struct __sk_buff *skb, __u32 offset, struct packet *packet)
{
	__u8 type;

	switch (packet->protocol) {
	case IPPROTO_TCP: {
		__u8 flags;

		// Only the first packet of a connection is looked at: of the others conntrack knows.
		if (!load_of(skb, packet, offset, packet->ports, sizeof(packet->ports)) ||
		    !load_of(skb, packet, offset + 13, &flags, sizeof(flags)))
			return 0;
		return (flags & 0x17) == 0x02; // SYN, and neither FIN, RST nor ACK
	}
	case IPPROTO_UDP:
		return load_of(skb, packet, offset, packet->ports, sizeof(packet->ports));
	case IPPROTO_SCTP:
		return load_of(skb, packet, offset, packet->ports, sizeof(packet->ports)) &&
		       load_of(skb, packet, offset + 12, &type, sizeof(type)) && type == SCTP_INIT;
	}
	// Subtle: errors are about connections, and conntrack's.
	packet->is_echo = 1;
	return packet->protocol == (packet->is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) &&
	       load_of(skb, packet, offset, &type, sizeof(type)) && type == (packet->is_ipv6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO);
}

static __always_inline int read4(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr ip;

	if (!load(skb, 0, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return 0;
	// Later fragments have no ports. Conntrack puts them together with the first before it looks.
	if (ip.frag_off & bpf_htons(FRAGMENT_OFFSET))
		return 0;
	packet->source = mapped(ip.saddr);
	packet->destination = mapped(ip.daddr);
	packet->protocol = ip.protocol;
	packet->tos = ip.tos;
	packet->end = bpf_ntohs(ip.tot_len);
	return read_transport(skb, ip.ihl * 4, packet);
}

static __always_inline int read6(struct __sk_buff *skb, struct packet *packet)
{
	struct ipv6hdr ip;
	__u32 offset = sizeof(ip);

	if (!load(skb, 0, &ip, sizeof(ip)) || ip.version != 6)
		return 0;
	__builtin_memcpy(&packet->source, &ip.saddr, sizeof(packet->source));
	__builtin_memcpy(&packet->destination, &ip.daddr, sizeof(packet->destination));
	// No host has an address of IPv4 on the wire of IPv6 (RFC 4038, section 4.2).
	if (is_mapped(&packet->source) || is_mapped(&packet->destination))
		return 0;
	packet->protocol = ip.nexthdr;
	packet->is_ipv6 = 1;
	packet->end = sizeof(ip) + bpf_ntohs(ip.payload_len);
	for (int i = 0; i <= EXTENSIONS; i++) {
		struct {
			__u8 next, length;
			__be16 fragment;
		} header;

		switch (packet->protocol) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return read_transport(skb, offset, packet);
		}
		if (!load_of(skb, packet, offset, &header, sizeof(header)))
			return 0;
		if (packet->protocol != IPPROTO_FRAGMENT)
			offset += (header.length + 1) * 8;
		else if (header.fragment & bpf_htons(0xfff8))
			return 0;
		else
			offset += 8;
		packet->protocol = header.next;
	}
	return 0;
}

static __always_inline int is_in(void *prefixes, const union address6 *address)
{
	struct prefix key = {
		.length = 128,
		.address = { address->parts[0], address->parts[1], address->parts[2], address->parts[3] },
	};

	return bpf_map_lookup_elem(prefixes, &key) != NULL;
}

// set_key makes the key of the frontend that a packet is to.
static __always_inline void set_key(struct flow *flow, const struct packet *packet, enum scope scope)
{
	struct frontend frontend __attribute__((aligned(8))) = {
		.port = packet->ports[1],
		.protocol = packet->protocol,
		.scope = scope,
	};

	if (packet->is_ipv6) {
		flow->key[1] = packet->destination.words[0];
		flow->key[2] = packet->destination.words[1];
	} else {
		frontend.address = packet->destination.parts[3];
	}
	flow->key[0] = *(const __u64 *)&frontend;
}

// The verifier looks at each of these functions once, and not at each of the ways on which they are called: together they would be
// too many for it.
#define VERIFIED_ALONE __attribute__((noinline))

// read_packet reads the headers of IP and what follows them. It returns false for what belongs to no Service.
VERIFIED_ALONE int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	if (!packet)
		return 0;
	// A device sees more than is for the node: what a switch sends to all, what a bridge passes on, what is of a VLAN. Of the latter
	// two the bridge's and the VLAN's own device sees again what is.
	if (skb->pkt_type != PACKET_HOST || skb->vlan_tci & VLAN_ID)
		return 0;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return read4(skb, packet);
	return skb->protocol == bpf_htons(ETH_P_IPV6) && read6(skb, packet);
}

// choose4 and choose6 give the frontend of a flow a backend, and return a verdict.
VERIFIED_ALONE int choose4(struct __sk_buff *skb, const struct packet *packet, struct flow *flow)
{
	if (!packet || !flow)
		return PASS;
	return choose(skb, &packet->source, &services4, &backends4, KEY4, flow);
}

VERIFIED_ALONE int choose6(struct __sk_buff *skb, const struct packet *packet, struct flow *flow)
{
	if (!packet || !flow)
		return PASS;
	return choose(skb, &packet->source, &services6, &backends6, KEY6, flow);
}

// exists4 and exists6 tell whether a flow's frontend is there.
VERIFIED_ALONE int exists4(const struct flow *flow)
{
	return flow && find(&services4, flow->key, KEY4, hash_of(flow->key, KEY4)) != NULL;
}

VERIFIED_ALONE int exists6(const struct flow *flow)
{
	return flow && find(&services6, flow->key, KEY6, hash_of(flow->key, KEY6)) != NULL;
}

// is_own_backend4 and is_own_backend6 tell whether a frontend is among its backends, as that of a process in the host's network may be.
static __always_inline int is_own_backend(void *services, int words, const struct flow *flow)
{
	struct flow own = *flow;
	__u64 hash = hash_of(flow->key, words);
	const __u64 *entry = find(services, flow->key, words, hash);
	if (!entry)
		return 0;
	const struct frontend *frontend = (const struct frontend *)own.key;

	own.choice.backend[0] = (__u64)frontend->address << 32 | (__u64)frontend->port << 16 | owner_of(hash);
	own.choice.backend[1] = flow->key[1];
	own.choice.backend[2] = flow->key[2];
	return has(words, entry, READ_ONCE(entry[words]), &own);
}

VERIFIED_ALONE int is_own_backend4(const struct flow *flow)
{
	return flow && is_own_backend(&services4, KEY4, flow);
}

VERIFIED_ALONE int is_own_backend6(const struct flow *flow)
{
	return flow && is_own_backend(&services6, KEY6, flow);
}

static __always_inline enum verdict choose_for(struct __sk_buff *skb, const struct packet *packet, struct flow *flow)
{
	return packet->is_ipv6 ? choose6(skb, packet, flow) : choose4(skb, packet, flow);
}

static __always_inline int exists(const struct packet *packet, const struct flow *flow)
{
	return packet->is_ipv6 ? exists6(flow) : exists4(flow);
}

static __always_inline __u32 tuple_of(const struct packet *packet, struct bpf_sock_tuple *tuple)
{
	if (!packet->is_ipv6) {
		tuple->ipv4.saddr = packet->source.parts[3];
		tuple->ipv4.daddr = packet->destination.parts[3];
		tuple->ipv4.sport = packet->ports[0];
		tuple->ipv4.dport = packet->ports[1];
		return sizeof(tuple->ipv4);
	}
	__builtin_memcpy(tuple->ipv6.saddr, &packet->source, sizeof(packet->source));
	__builtin_memcpy(tuple->ipv6.daddr, &packet->destination, sizeof(packet->destination));
	tuple->ipv6.sport = packet->ports[0];
	tuple->ipv6.dport = packet->ports[1];
	return sizeof(tuple->ipv6);
}

// has_entry tells whether conntrack has the connection of a packet.
static __always_inline int has_entry(struct __sk_buff *skb, const struct packet *packet, struct bpf_sock_tuple *tuple, __u32 size)
{
	struct bpf_ct_opts opts = { .netns_id = THIS_NETNS, .l4proto = packet->protocol };

	if (packet->protocol == IPPROTO_SCTP)
		return 0;
	struct nf_conn *conn = bpf_skb_ct_lookup(skb, tuple, size, &opts, sizeof(opts));
	if (!conn)
		return 0;
	bpf_ct_release(conn);
	return 1;
}

// is_known tells whether conntrack has the connection of a packet, and knows its backend. NAT to what it is to anyway, as it is its own
// backend, leaves no trace in an entry.
//
// Subtle: where conntrack is going to begin anew, as a client used its port again, it knows no Service. And of what was begun
// before there was one, it goes on to know none. Such entries end here.
static __always_inline int is_known(struct __sk_buff *skb, const struct packet *packet, const struct flow *flow, struct bpf_sock_tuple *tuple,
				    __u32 size)
{
	struct bpf_ct_opts opts = { .netns_id = THIS_NETNS, .l4proto = packet->protocol };
	if (packet->protocol == IPPROTO_SCTP)
		return 0;
	struct nf_conn *conn = bpf_skb_ct_lookup(skb, tuple, size, &opts, sizeof(opts));

	if (!conn)
		return 0;
	int is_over = packet->protocol == IPPROTO_TCP &&
		      (conn->proto.tcp.state == TCP_STATE_TIME_WAIT || conn->proto.tcp.state == TCP_STATE_CLOSE);
	int is_translated = conn->status & STATUS_DST_NAT || (packet->is_ipv6 ? is_own_backend6(flow) : is_own_backend4(flow));
	int known = opts.dir != DIR_ORIGINAL || (is_translated && !is_over);
	if (!known)
		bpf_ct_change_timeout(conn, 0);
	bpf_ct_release(conn);
	if (known)
		return 1;
	// Subtle: an entry whose time is up goes when it is met by a look-up, and only by one (nf_ct_gc_expired).
	conn = bpf_skb_ct_lookup(skb, tuple, size, &opts, sizeof(opts));
	if (conn)
		bpf_ct_release(conn);
	return 0;
}

static __always_inline union nf_inet_addr inet_address(const struct packet *packet, const union address6 *address)
{
	union nf_inet_addr all = { .all = { address->parts[3] } };

	if (packet->is_ipv6)
		__builtin_memcpy(&all, address, sizeof(all));
	return all;
}

static __always_inline union address6 backend_address(const struct packet *packet, const struct flow *flow)
{
	union address6 address = mapped(flow->choice.backend[0] >> 32);

	if (packet->is_ipv6) {
		address.words[0] = flow->choice.backend[1];
		address.words[1] = flow->choice.backend[2];
	}
	return address;
}

// A masking says which source address a backend is to see.
enum masking {
	CLIENTS, // the client's
	OWN,	 // the node's
	UNKNOWN, // the node's, which has none on the way there
};

// own_address gives the address that the node has to a backend, as a rule that masquerades would choose it. To a backend that is the
// node itself packets go as they are.
static __always_inline enum masking own_address(struct __sk_buff *skb, const struct packet *packet, const union address6 *backend, union address6 *own)
{
	struct bpf_fib_lookup fib = { .family = packet->is_ipv6 ? 10 : 2, .l4_protocol = packet->protocol, .ifindex = skb->ifindex };

	if (packet->is_ipv6) {
		__builtin_memcpy(fib.ipv6_src, &packet->source, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, backend, sizeof(fib.ipv6_dst));
	} else {
		fib.tos = packet->tos;
		fib.ipv4_src = packet->source.parts[3];
		fib.ipv4_dst = backend->parts[3];
	}
	switch (bpf_fib_lookup(skb, &fib, sizeof(fib), FIB_LOOKUP_SKIP_NEIGH | FIB_LOOKUP_SRC)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED: // this packet is too large, others are not
		break;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		return CLIENTS;
	default:
		return UNKNOWN;
	}
	if (packet->is_ipv6)
		__builtin_memcpy(own, fib.ipv6_src, sizeof(*own));
	else
		*own = mapped(fib.ipv4_src);
	return OWN;
}

// A binding is what conntrack is to do to a connection.
struct binding {
	union nf_inet_addr backend, source;
	int port;
	int source_too;
};

// insert gives a connection an entry of conntrack, or returns false if it has one or if another has its answers'.
static __always_inline int insert(struct __sk_buff *skb, const struct packet *packet, struct bpf_sock_tuple *tuple, __u32 size,
				  struct binding *binding)
{
	struct bpf_ct_opts opts = { .netns_id = THIS_NETNS, .l4proto = packet->protocol };
	struct nf_conn___init *begun = bpf_skb_ct_alloc(skb, tuple, size, &opts, sizeof(opts));
	struct nf_conn *conn;

	if (!begun)
		return 0;
	bpf_ct_set_timeout(begun, NEW_TIMEOUT_MS);
	bpf_ct_set_nat_info(begun, &binding->backend, binding->port, NF_NAT_MANIP_DST);
	if (binding->source_too)
		bpf_ct_set_nat_info(begun, &binding->source, ANY_PORT, NF_NAT_MANIP_SRC);
	conn = bpf_ct_insert_entry(begun);
	if (!conn)
		return 0;
	bpf_ct_release(conn);
	return 1;
}

// bind sends a connection to its backend.
static __always_inline int bind(struct __sk_buff *skb, const struct packet *packet, const struct flow *flow, int masquerade,
				struct bpf_sock_tuple *tuple, __u32 size)
{
	union address6 backend = backend_address(packet, flow), own;
	struct binding binding = {
		.backend = inet_address(packet, &backend),
		.source = inet_address(packet, &packet->source),
		.port = bpf_ntohs((__u16)(flow->choice.backend[0] >> 16)),
	};

	// A pod that is its own backend would answer itself, past conntrack.
	if (backend.words[0] == packet->source.words[0] && backend.words[1] == packet->source.words[1])
		masquerade = 1;
	// Subtle: conntrack's functions for BPF refuse SCTP (net/netfilter/nf_conntrack_bpf.c), and a rule's NAT takes no address from a
	// program, but a mark, by which nat.go's map has the backend. To an association that conntrack knows the mark means nothing.
	if (packet->protocol == IPPROTO_SCTP) {
		skb->mark = SCTP_MARK | (masquerade ? SCTP_MASQUERADE : 0) | flow->choice.index;
		return TCX_NEXT;
	}
	switch (masquerade ? own_address(skb, packet, &backend, &own) : CLIENTS) {
	case OWN:
		binding.source = inet_address(packet, &own);
		binding.source_too = 1;
		break;
	case UNKNOWN:
		return TCX_DROP;
	case CLIENTS:
		break;
	}
	if (insert(skb, packet, tuple, size, &binding))
		return TCX_NEXT;
	// Either another processor was faster, or the client has a connection from this port to the backend by another address of
	// the Service: then the port has to be changed.
	binding.source_too = 1;
	return insert(skb, packet, tuple, size, &binding) || has_entry(skb, packet, tuple, size) ? TCX_NEXT : TCX_DROP;
}

// refuse has nat.go's rules answer a packet as one that came to a closed port.
static __always_inline int refuse(struct __sk_buff *skb)
{
	skb->mark = REFUSE_MARK;
	return TCX_NEXT;
}

// unknown says what becomes of a packet that is to no port of a Service: at the address of one it is refused, and dropped at
// what may become the address of one. A flow that there was before is somebody's, and goes on; so does what another proxy on the node
// translates, which nat.go's rules see after it.
static __always_inline int unknown(struct __sk_buff *skb, const struct packet *packet, struct bpf_sock_tuple *tuple, __u32 size)
{
	if (!is_in(&cluster_ips, &packet->destination) || (!packet->is_echo && has_entry(skb, packet, tuple, size)))
		return TCX_NEXT;
	skb->mark = bpf_map_lookup_elem(&addresses, &packet->destination) ? REFUSE_MARK : DISCARD_MARK;
	return TCX_NEXT;
}

// An origin says who sends what arrives at a device.
enum origin {
	ANYBODY, // it goes by the source address
	PODS,
	NODE, // the node's own processes
};

static __always_inline int forward(struct __sk_buff *skb, enum origin origin)
{
	struct packet packet = {};
	struct flow flow = {};
	struct bpf_sock_tuple tuple = {};

	if (!read_packet(skb, &packet))
		return TCX_NEXT;
	if (packet.is_echo)
		return unknown(skb, &packet, &tuple, 0);

	set_key(&flow, &packet, INSIDE);
	__u32 size = tuple_of(&packet, &tuple);
	if (!exists(&packet, &flow))
		return unknown(skb, &packet, &tuple, size);
	if (is_known(skb, &packet, &flow, &tuple, size))
		return TCX_NEXT;

	int inside = origin == NODE || (KNOWS_INSIDERS && (origin == PODS || is_in(&insiders, &packet.source)));
	enum verdict verdict = PASS;
	if (!inside) {
		set_key(&flow, &packet, OUTSIDE);
		verdict = choose_for(skb, &packet, &flow);
	}
	if (verdict == PASS) {
		set_key(&flow, &packet, INSIDE);
		verdict = choose_for(skb, &packet, &flow);
		// At a Service's own address those outside get one of the node, so that answers come back this way. So does the node
		// itself, whose first choice was for the way to the Service, and not for that to the backend.
		if (origin == NODE || (KNOWS_INSIDERS && !inside))
			flow.choice.service |= MASQUERADE;
	}
	switch (verdict) {
	case TRANSLATE:
		return bind(skb, &packet, &flow, !!(flow.choice.service & MASQUERADE), &tuple, size);
	case REFUSE:
		return refuse(skb);
	case DISCARD:
		return TCX_DROP;
	case PASS:
		break;
	}
	return TCX_NEXT;
}

// A device is the way of pods of the cluster, or of whoever the source address says.
SEC("tcx/ingress")
int ingress(struct __sk_buff *skb)
{
	return forward(skb, ANYBODY);
}

SEC("tcx/ingress")
int ingress_pods(struct __sk_buff *skb)
{
	return forward(skb, PODS);
}

// What the node's own processes send arrives by loop.go's devices.
SEC("tcx/ingress")
int ingress_node(struct __sk_buff *skb)
{
	return forward(skb, NODE);
}

// What they send to an address of the node goes by loopback, whatever other routes there are, and is moved to those devices from here. A
// frame of loopback has no address of a device.
SEC("tcx/egress")
int egress_loopback(struct __sk_buff *skb)
{
	static const __u8 address[] = LOOP_MAC;

	if (skb->mark != LOOP_MARK)
		return TCX_NEXT;
	if (bpf_skb_store_bytes(skb, __builtin_offsetof(struct ethhdr, h_dest), address, sizeof(address), 0))
		return TCX_DROP;
	return bpf_redirect(loop_device, BPF_F_INGRESS);
}

char __license[] SEC("license") = "Dual BSD/GPL";
