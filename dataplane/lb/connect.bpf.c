// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The socket half of the load balancer: connect(2) to a Service address becomes a connect(2) to one of its backends.
// dataplane/README.md draws the packet's way; table.go, word.go and sync.go write the maps that are read here.

#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// A frontend is what is looked up: for IPv4 this one word, for IPv6 the word without an address and two with it.
struct frontend {
	__be32 address;
	__be16 port;
	__u8 protocol;
	__u8 scope; // 0: from inside the cluster
};

#define KEY4 1 // words of a key
#define KEY6 3

// A backend is a word {address:32, port:16, owner:16}, address and port in network byte order; for IPv6 it has no address,
// which follows in two more, and a fourth is the hash of the three.
#define SLOT4 1 // words of a slot of a backends map
#define SLOT6 4

// An entry is what is known of a frontend, in one cache line: its key, its service word {base:32, count:16, owner:16}, and
// for IPv4 room for two sets of three backends. The backends are count from base: words of the entry itself if base is
// below ENTRY_WORDS, else slots of the backends map. The service is one word because an update must be seen whole.
#define ENTRY_WORDS 8

// A bucket is a page of entries, so that a look-up touches one page. Its entries are probed from the one that the hash
// names, round and round, to the first that is empty.
#define BUCKET_ENTRIES 64

struct bucket {
	__u64 entries[BUCKET_ENTRIES][ENTRY_WORDS];
};

// The services of a family are an open-addressing hash table. The element after its last bucket is for the process that
// writes it.
struct services {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bucket);
	__uint(max_entries, (1 << 11) + 1);
	__uint(map_flags, BPF_F_MMAPABLE);
};

struct services services4 SEC(".maps"), services6 SEC(".maps");

// The backends of services that have more than three, and for IPv6 all.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, SLOT4 * sizeof(__u64));
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_MMAPABLE);
} backends4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, SLOT6 * sizeof(__u64));
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_MMAPABLE);
} backends6 SEC(".maps");

// Set before the programs are loaded, and then constants to the verifier. The seeds are odd.
const volatile __u64 seeds4[KEY4], seeds6[KEY6];
const volatile __u32 bucket_mask; // buckets - 1

// Subtle: words that another processor may be writing are read once.
#define READ_ONCE(word) (*(const volatile __u64 *)&(word))

// hash_of is a multilinear hash with secret multipliers, so that nobody can choose Services that meet in one bucket
// (Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair problem", 1997), and what MurmurHash3
// finishes with, which spreads neighbouring addresses.
static __always_inline __u64 hash_of(const __u64 *key, const volatile __u64 *seeds, int words)
{
	__u64 hash = 0;

#pragma unroll
	for (int i = 0; i < words; i++)
		hash += key[i] * seeds[i];
	hash = (hash ^ hash >> 33) * 0xff51afd7ed558ccdULL;
	return (hash ^ hash >> 33) * 0xc4ceb9fe1a85ec53ULL;
}

// owner_of gives the 16 bits that mark what belongs to a frontend. They are never all zero, as what was not written is.
static __always_inline __u16 owner_of(__u64 hash)
{
	return hash >> 16 | 1;
}

// find gives the entry of a frontend, or NULL.
static __always_inline const __u64 *find(void *services, const __u64 *key, int words, __u64 hash)
{
	__u32 index = (hash >> 40) & bucket_mask;
	const struct bucket *bucket = bpf_map_lookup_elem(services, &index);
	if (!bucket)
		return NULL;

	for (__u32 probe = 0; probe < BUCKET_ENTRIES; probe++) {
		const __u64 *entry = bucket->entries[((hash >> 34) + probe) % BUCKET_ENTRIES];
		__u64 first = READ_ONCE(entry[0]);
		if (first == key[0] && (words == KEY4 || (READ_ONCE(entry[1]) == key[1] && READ_ONCE(entry[2]) == key[2])))
			return entry;
		if (!first)
			return NULL;
	}
	return NULL;
}

// A verdict says what becomes of a connect.
enum verdict {
	PASS,      // there is no such Service: the connect goes on as it was asked for
	TRANSLATE, // it goes to the backend
	REFUSE,    // the Service has no backends
};

// Each round is one look at a state that may be changing. Two rounds are rare, four are never seen.
#define ROUNDS 4

// choose gives a backend of the frontend: one word of it for IPv4, three for IPv6.
static __always_inline enum verdict choose(void *services, void *backends, const volatile __u64 *seeds, const __u64 *key,
					   int words, __u64 *backend)
{
	__u64 hash = hash_of(key, seeds, words);
	__u16 owner = owner_of(hash);

	for (int round = 0; round < ROUNDS; round++) {
		const __u64 *entry = find(services, key, words, hash);
		if (!entry)
			return PASS;

		// Subtle: the entry may by now have been given to another frontend; the owner tells.
		__u64 service = READ_ONCE(entry[words]);
		if ((__u16)service != owner)
			continue;

		__u32 count = (service >> 16) & 0xffff;
		if (!count)
			return REFUSE;

		// Multiplying high is uniform to within count / 2^32 and spares the division of random % count.
		__u32 index = service >> 32;
		if (count > 1)
			index += ((__u64)bpf_get_prandom_u32() * count) >> 32;

		if (words == KEY4 && index < ENTRY_WORDS) {
			backend[0] = READ_ONCE(entry[index]);
		} else {
			const __u64 *slot = bpf_map_lookup_elem(backends, &index);
			if (!slot)
				continue;
			backend[0] = READ_ONCE(slot[0]);
			if (words == KEY6) {
				backend[1] = READ_ONCE(slot[1]);
				backend[2] = READ_ONCE(slot[2]);
				// Subtle: words of two backends, if the slot is being written.
				if (READ_ONCE(slot[3]) != hash_of(backend, seeds, KEY6))
					continue;
			}
		}
		// Subtle: a place that was given to another frontend since the service was read shows by its owner too, and
		// one that lost its backend holds zero.
		if ((__u16)backend[0] != owner)
			continue;
		return TRANSLATE;
	}
	return REFUSE;
}

// frontend_word makes the first word of a key. protocol is 262 for MPTCP, which in eight bits is TCP, as it should be.
static __always_inline __u64 frontend_word(__be32 address, __be16 port, __u8 protocol)
{
	struct frontend frontend __attribute__((aligned(8))) = {
		.address = address,
		.port = port,
		.protocol = protocol,
	};

	return *(const __u64 *)&frontend;
}

static __always_inline enum verdict choose4(__be32 address, struct bpf_sock_addr *ctx, __u64 *backend)
{
	__u64 key[KEY4] = { frontend_word(address, ctx->user_port, ctx->protocol) };

	return choose(&services4, &backends4, seeds4, key, KEY4, backend);
}

// answer gives what the hook returns.
static __always_inline int answer(enum verdict verdict)
{
	if (verdict != REFUSE)
		return 1;
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	__u64 backend;
	enum verdict verdict = choose4(ctx->user_ip4, ctx, &backend);

	if (verdict == TRANSLATE) {
		ctx->user_ip4 = backend >> 32;
		ctx->user_port = (backend >> 16) & 0xffff;
	}
	return answer(verdict);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	__u32 address[4] __attribute__((aligned(8))) = {
		ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3],
	};
	__u64 backend[KEY6];
	enum verdict verdict;

	// An IPv4 address in an IPv6 socket is a Service of IPv4.
	if (!address[0] && !address[1] && address[2] == bpf_htonl(0xffff)) {
		verdict = choose4(address[3], ctx, backend);
		if (verdict == TRANSLATE) {
			ctx->user_ip6[3] = backend[0] >> 32;
			ctx->user_port = (backend[0] >> 16) & 0xffff;
		}
		return answer(verdict);
	}

	__u64 key[KEY6] = {
		frontend_word(0, ctx->user_port, ctx->protocol),
		((const __u64 *)address)[0],
		((const __u64 *)address)[1],
	};
	verdict = choose(&services6, &backends6, seeds6, key, KEY6, backend);
	if (verdict == TRANSLATE) {
		ctx->user_ip6[0] = ((const __u32 *)backend)[2];
		ctx->user_ip6[1] = ((const __u32 *)backend)[3];
		ctx->user_ip6[2] = ((const __u32 *)backend)[4];
		ctx->user_ip6[3] = ((const __u32 *)backend)[5];
		ctx->user_port = (backend[0] >> 16) & 0xffff;
	}
	return answer(verdict);
}

char __license[] SEC("license") = "Dual BSD/GPL";
