// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The socket half of the load balancer: connect(2) to a Service address becomes a connect(2) to one of its backends, and
// sendto(2) likewise, whose answers come from the Service's address again. dataplane/README.md draws the packet's way.

#include "flows.h"

// A stream is what a TCP socket connected to last, if getpeername(2) is to know. It is a cache line.
struct stream {
	__u64 cookie; // of the socket, or zero if this is free
	__u64 key[KEY6];
	__u64 backend[KEY6];
	__u64 unused;
};

// Streams are found by their sockets' cookies, which the kernel counts up: one that is connected now is beside the one before. The socket has
// the first free place from there when it connects, and the release hook frees that when the socket is closed.
//
// Note: the socket's own storage was the first plan, and allocating it cost a connect five times what this does. It is left
// for the sockets that find the places from their cookie on taken.
#define STREAMS (1 << 16)
#define STREAM_PLACES 8 // from a cookie on

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct stream);
	__uint(max_entries, STREAMS);
	__uint(map_flags, BPF_F_MMAPABLE); // which begins it at a page, and each stream at a cache line
} streams SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct stream);
} crowded_streams SEC(".maps");

// stream_at gives a place for the stream of a socket.
static __always_inline struct stream *stream_at(__u64 cookie, __u32 place)
{
	__u32 index = (cookie + place) % STREAMS;

	return bpf_map_lookup_elem(&streams, &index);
}

// stream_of gives the stream of a socket, or NULL.
static __always_inline struct stream *stream_of(__u64 cookie)
{
	for (__u32 place = 0; place < STREAM_PLACES; place++) {
		struct stream *stream = stream_at(cookie, place);

		if (stream && READ_ONCE(stream->cookie) == cookie)
			return stream;
	}
	return NULL;
}

// new_stream gives a socket a stream, or NULL where there is neither a place nor memory.
static __always_inline struct stream *new_stream(struct bpf_sock_addr *ctx, __u64 cookie)
{
	for (__u32 place = 0; place < STREAM_PLACES; place++) {
		struct stream *stream = stream_at(cookie, place);

		// Subtle: other sockets are looking, too.
		if (stream && !READ_ONCE(stream->cookie) && !__sync_val_compare_and_swap(&stream->cookie, 0, cookie))
			return stream;
	}
	return bpf_sk_storage_get(&crowded_streams, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
}

// recall gives a flow the choice that was made for its key before, or returns false.
static __always_inline int recall(struct flows *flows, struct flow *flow)
{
	int known = 0;

	bpf_spin_lock(&flows->lock);
	for (__u32 i = 0; i < FLOWS; i++) {
		if (same(flows->flows[i].key, flow->key)) {
			flow->choice = flows->flows[i].choice;
			flows->last = i;
			known = 1;
			break;
		}
	}
	bpf_spin_unlock(&flows->lock);
	return known;
}

// remember keeps a flow in the place of the one with its key, or of the oldest.
static __always_inline void remember(struct flows *flows, const struct flow *flow)
{
	bpf_spin_lock(&flows->lock);
	__u32 place = FLOWS;
	for (__u32 i = 0; i < FLOWS; i++) {
		if (same(flows->flows[i].key, flow->key))
			place = i;
	}
	if (place == FLOWS)
		place = flows->next++;
	place %= FLOWS;
	flows->last = place;
	flows->flows[place] = *flow;
	bpf_spin_unlock(&flows->lock);
}

// translate finds a backend for what a socket connects or sends to. A flow of a UDP socket keeps the one that it had.
static __always_inline enum verdict translate(struct bpf_sock_addr *ctx, void *services, void *backends, int words,
					      struct flow *flow)
{
	struct flows *flows = NULL;
	int is_udp = ctx->protocol == IPPROTO_UDP;

	if (is_udp && (flows = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, 0)) && recall(flows, flow)) {
		__u64 service = flow->choice.service, index = flow->choice.index;

		if (keeps(services, backends, words, flow)) {
			if (flow->choice.service != service || flow->choice.index != index)
				remember(flows, flow);
			return TRANSLATE;
		}
	}

	enum verdict verdict = choose(ctx, NULL, services, backends, words, flow);
	if (verdict != TRANSLATE)
		return verdict;

	// Without memory for what is to be remembered the packets go their way all the same, and the peer has the backend's name.
	if (is_udp) {
		if (!flows)
			flows = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
		// Another thread may have created it in between.
		if (!flows)
			flows = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, 0);
		if (flows)
			remember(flows, flow);
	} else if (PEER_NAMES) {
		__u64 cookie = bpf_get_socket_cookie(ctx);
		struct stream *stream = stream_of(cookie);

		if (!stream)
			stream = new_stream(ctx, cookie);
		if (stream) {
			copy(stream->key, flow->key);
			copy(stream->backend, flow->choice.backend);
		}
	}
	return TRANSLATE;
}

// frontend_word makes the first word of a key. protocol is 262 for MPTCP, which in eight bits is TCP, as it should be.
static __always_inline __u64 frontend_word(__be32 address, struct bpf_sock_addr *ctx)
{
	struct frontend frontend __attribute__((aligned(8))) = {
		.address = address,
		.port = ctx->user_port,
		.protocol = ctx->protocol,
	};

	return *(const __u64 *)&frontend;
}

static __always_inline enum verdict translate4(struct bpf_sock_addr *ctx, __be32 address, struct flow *flow)
{
	flow->key[0] = frontend_word(address, ctx);
	return translate(ctx, &services4, &backends4, KEY4, flow);
}

// answer gives what a hook returns.
static __always_inline int answer(enum verdict verdict)
{
	if (verdict != REFUSE)
		return 1;
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

static __always_inline int forward4(struct bpf_sock_addr *ctx)
{
	struct flow flow = {};
	enum verdict verdict = translate4(ctx, ctx->user_ip4, &flow);

	if (verdict == TRANSLATE) {
		ctx->user_ip4 = flow.choice.backend[0] >> 32;
		ctx->user_port = (flow.choice.backend[0] >> 16) & 0xffff;
	}
	return answer(verdict);
}

static __always_inline union address6 address6_of(struct bpf_sock_addr *ctx)
{
	union address6 address = {
		.parts = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
	};

	return address;
}

static __always_inline void set_address6(struct bpf_sock_addr *ctx, const union address6 *address)
{
	ctx->user_ip6[0] = address->parts[0];
	ctx->user_ip6[1] = address->parts[1];
	ctx->user_ip6[2] = address->parts[2];
	ctx->user_ip6[3] = address->parts[3];
}

static __always_inline int forward6(struct bpf_sock_addr *ctx)
{
	union address6 address = address6_of(ctx);
	struct flow flow = {};
	enum verdict verdict;

	// An IPv4 address in an IPv6 socket is a Service of IPv4.
	if (is_mapped(&address)) {
		verdict = translate4(ctx, address.parts[3], &flow);
		if (verdict == TRANSLATE)
			ctx->user_ip6[3] = flow.choice.backend[0] >> 32;
	} else {
		flow.key[0] = frontend_word(0, ctx);
		flow.key[1] = address.words[0];
		flow.key[2] = address.words[1];
		verdict = translate(ctx, &services6, &backends6, KEY6, &flow);
		if (verdict == TRANSLATE) {
			address.words[0] = flow.choice.backend[1];
			address.words[1] = flow.choice.backend[2];
			set_address6(ctx, &address);
		}
	}
	if (verdict == TRANSLATE)
		ctx->user_port = (flow.choice.backend[0] >> 16) & 0xffff;
	return answer(verdict);
}

// name gives the key of the flow by which a socket has a peer, or returns false.
static __always_inline int name(struct bpf_sock_addr *ctx, const __u64 *peer, __u64 *key)
{
	int found = 0;

	if (ctx->protocol != IPPROTO_UDP) {
		const struct stream *stream = stream_of(bpf_get_socket_cookie(ctx));

		if (!stream)
			stream = bpf_sk_storage_get(&crowded_streams, ctx->sk, NULL, 0);
		if (!stream || !is_from(stream->key, stream->backend, peer))
			return 0;
		copy(key, stream->key);
		return 1;
	}
	struct flows *flows = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, 0);
	if (!flows)
		return 0;
	bpf_spin_lock(&flows->lock);
	// If two Services of the socket have this backend, it is most likely the one that was sent to last.
	__u32 last = flows->last;
	for (__u32 i = 0; i < FLOWS && !found; i++) {
		const struct flow *flow = &flows->flows[(last + i) % FLOWS];

		if (is_from(flow->key, flow->choice.backend, peer)) {
			copy(key, flow->key);
			found = 1;
		}
	}
	bpf_spin_unlock(&flows->lock);
	return found;
}

static __always_inline int name4(struct bpf_sock_addr *ctx, __be32 address, struct frontend *frontend)
{
	__u64 peer[KEY6] = { (__u64)address << 32 | (__u64)(__u16)ctx->user_port << 16 }, key[KEY6];

	if (!name(ctx, peer, key))
		return 0;
	*frontend = *(const struct frontend *)key;
	return 1;
}

// reverse4 and reverse6 put a Service's address where one of its backends stands.
static __always_inline int reverse4(struct bpf_sock_addr *ctx)
{
	struct frontend frontend;

	if (name4(ctx, ctx->user_ip4, &frontend)) {
		ctx->user_ip4 = frontend.address;
		ctx->user_port = frontend.port;
	}
	return 1;
}

static __always_inline int reverse6(struct bpf_sock_addr *ctx)
{
	union address6 address = address6_of(ctx);

	if (is_mapped(&address)) {
		struct frontend frontend;

		if (name4(ctx, address.parts[3], &frontend)) {
			ctx->user_ip6[3] = frontend.address;
			ctx->user_port = frontend.port;
		}
		return 1;
	}
	__u64 peer[KEY6] = { (__u64)(__u16)ctx->user_port << 16, address.words[0], address.words[1] }, key[KEY6];

	if (name(ctx, peer, key)) {
		address.words[0] = key[1];
		address.words[1] = key[2];
		set_address6(ctx, &address);
		ctx->user_port = ((const struct frontend *)key)->port;
	}
	return 1;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx);
}

// release is run when a socket is closed.
SEC("cgroup/sock_release")
int release(struct bpf_sock *ctx)
{
	if (ctx->protocol == IPPROTO_UDP)
		return 1;
	struct stream *stream = stream_of(bpf_get_socket_cookie(ctx));

	if (stream) {
		stream->key[0] = 0;
		__sync_lock_test_and_set(&stream->cookie, 0);
	}
	return 1;
}

char __license[] SEC("license") = "Dual BSD/GPL";
