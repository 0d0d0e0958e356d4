// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// What the socket hooks and the packet path share: the maps of frontends and their backends, and how one is chosen. table.go,
// word.go and sync.go write these maps.

#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// A frontend is what is looked up: for IPv4 this one word, for IPv6 the word without an address and two with it.
struct frontend {
	__be32 address;
	__be16 port;
	__u8 protocol;
	__u8 scope;
};

// A frontend may be another one to clients outside the cluster, of whom only packets are seen.
enum scope {
	INSIDE,
	OUTSIDE,
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
#define AFFINITY_ID 6
#define AFFINITY_TIMEOUT 7

// The top bits of base are flags. AFFINITY says that clients keep their backend: then no backend is in the entry, but the id
// of the affinity and its timeout in nanoseconds, both above 16 bits of zeros by which they cannot be taken for a backend.
#define AFFINITY (1ULL << 63)
#define DROP (1ULL << 62)	// without backends packets are dropped, not refused
#define RANGES (1ULL << 61)	// for clients of some addresses alone
#define MASQUERADE (1ULL << 60) // the backend shall see an address of the node, not the client's
#define FLAGS (0x1fULL << 59)

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

// A choice is a backend, and the service word by which it was found.
struct choice {
	__u64 service;
	__u64 index;         // where the backend was: in the entry or in the backends map
	__u64 backend[KEY6]; // of IPv4 only the first
};

// A flow is what a socket sends to.
struct flow {
	__u64 key[KEY6]; // of IPv4 only the first
	struct choice choice;
};

// An address6 is an address of IPv6, or one of IPv4 that is mapped into it.
union address6 {
	__u32 parts[4];
	__u64 words[2];
};

// A client is an address. At the socket, where it has none yet, it is the one that packets from its network namespace have: a pod's,
// or the node's. While that is not known it is the namespace. An affinity is what frontends share that are the same to it, as
// those of a Service port are.
struct client {
	__u64 who[2]; // of an address6; or the namespace's cookie and zero
	__u64 affinity;
	__u64 words; // of a key: each IP version has its own
};

struct kept {
	__u64 backend[KEY6]; // without an owner
	__u64 used;          // when a connect had it last, by CLOCK_MONOTONIC in nanoseconds
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct client);
	__type(value, struct kept);
	__uint(max_entries, 1 << 16);
} affinities SEC(".maps");

// A namespace is a network namespace, by what packets from it have as their source: an address of IPv4, and one of IPv6. Zero is
// none. The agent looks at those whose cookies are in strangers.
struct namespace {
	union address6 sources[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u64); // its cookie
	__type(value, struct namespace);
	__uint(max_entries, 1 << 12);
} namespaces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} strangers SEC(".maps");

// A range is where clients are for whom a frontend with RANGES is.
struct range {
	__u32 length; // in bits, of what follows
	__u32 zero;
	__u64 key[KEY6];
	union address6 address;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct range);
	__type(value, __u8);
	__uint(max_entries, 1 << 16);
} ranges SEC(".maps");

// These numbers stand for what is only known when the programs are loaded, and is then put in their place (constants.go). The seeds are
// odd, and BUCKET_MASK is one less than there are buckets.
//
// Note: constants of .rodata were the first plan. They are in a page of their own, which costs each look-up a walk of page tables where
// system calls empty the TLB.
#define CONSTANT(number)                                 \
	({                                               \
		__u64 constant;                          \
		asm("%0 = " #number " ll" : "=r"(constant)); \
		constant;                                \
	})
#define SEED4 CONSTANT(0x706c696d736f6c01)
#define SEED6_0 CONSTANT(0x706c696d736f6c02)
#define SEED6_1 CONSTANT(0x706c696d736f6c03)
#define SEED6_2 CONSTANT(0x706c696d736f6c04)
#define BUCKET_MASK CONSTANT(0x706c696d736f6c05)
#define PEER_NAMES CONSTANT(0x706c696d736f6c06)	    // whether getpeername(2) of a TCP socket names the Service
#define REFUSE_MARK CONSTANT(0x706c696d736f6c07)    // on packets that nat.go's rules answer with a refusal
#define DISCARD_MARK CONSTANT(0x706c696d736f6c08)   // on those that they drop
#define KNOWS_INSIDERS CONSTANT(0x706c696d736f6c09) // whether clients outside the cluster can be told from those inside
#define LOOP_MARK CONSTANT(0x706c696d736f6c0a)	    // on packets that go to the loop

// Subtle: words that another processor may be writing are read once.
#define READ_ONCE(word) (*(const volatile __u64 *)&(word))

// hash_of is a multilinear hash with secret multipliers, so that nobody can choose Services that meet in one bucket
// (Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair problem", 1997), and what MurmurHash3
// finishes with, which spreads neighbouring addresses.
static __always_inline __u64 hash_of(const __u64 *key, int words)
{
	__u64 hash = words == KEY4 ? key[0] * SEED4 : key[0] * SEED6_0 + key[1] * SEED6_1 + key[2] * SEED6_2;

	hash = (hash ^ hash >> 33) * 0xff51afd7ed558ccdULL;
	return (hash ^ hash >> 33) * 0xc4ceb9fe1a85ec53ULL;
}

// owner_of gives the 16 bits that mark what belongs to a frontend. They are never all zero, as what was not written is.
static __always_inline __u16 owner_of(__u64 hash)
{
	return hash >> 16 | 1;
}

static __always_inline void copy(__u64 *to, const __u64 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
}

static __always_inline int same(const __u64 *a, const __u64 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

// find gives the entry of a frontend, or NULL.
static __always_inline const __u64 *find(void *services, const __u64 *key, int words, __u64 hash)
{
	__u32 index = (hash >> 40) & BUCKET_MASK;
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

static __always_inline __u32 base_of(__u64 service)
{
	return (service & ~FLAGS) >> 32;
}

static __always_inline __u32 count_of(__u64 service)
{
	return (service >> 16) & 0xffff;
}

// A verdict says what becomes of a connect, a datagram or a packet.
enum verdict {
	PASS,      // there is no such Service here: it goes on as it was asked for
	TRANSLATE, // it goes to the backend
	REFUSE,    // the Service has no backends
	DISCARD,   // it has none for this client
};

// read_backend gives a backend of the entry of a frontend or of the backends map: one word of it for IPv4, three for IPv6. It
// returns false for what does not exist, or was met while it was written.
static __always_inline int read_backend(void *backends, const __u64 *entry, int words, __u32 index,
					__u64 *backend)
{
	if (words == KEY4 && index < ENTRY_WORDS) {
		backend[0] = READ_ONCE(entry[index]);
		return 1;
	}
	const __u64 *slot = bpf_map_lookup_elem(backends, &index);
	if (!slot)
		return 0;
	backend[0] = READ_ONCE(slot[0]);
	if (words == KEY4)
		return 1;
	backend[1] = READ_ONCE(slot[1]);
	backend[2] = READ_ONCE(slot[2]);
	// Subtle: words of two backends, if the slot is being written.
	return READ_ONCE(slot[3]) == hash_of(backend, KEY6);
}

// A search is for the backend of a flow among those of its frontend.
struct search {
	struct flow *flow;
	const __u64 *entry;
	__u32 base; // of the frontend's backends
	__u32 found;
};

// look is a step of a search, and ends it when it returns 1.
static __always_inline long look(void *backends, int words, __u32 step, struct search *search)
{
	__u64 backend[KEY6] = {};

	// The owner is in the first word.
	if (!read_backend(backends, search->entry, words, search->base + step, backend) ||
	    !same(backend, search->flow->choice.backend))
		return 0;
	search->flow->choice.index = search->base + step;
	search->found = 1;
	return 1;
}

static long look4(__u32 step, void *search)
{
	return look(&backends4, KEY4, step, search);
}

static long look6(__u32 step, void *search)
{
	return look(&backends6, KEY6, step, search);
}

// has tells whether a flow's backend is one of those that a service word leads to.
static __always_inline int has(int words, const __u64 *entry, __u64 service, struct flow *flow)
{
	struct search search = { .flow = flow, .entry = entry, .base = base_of(service) };

	bpf_loop(count_of(service), words == KEY4 ? look4 : look6, &search, 0);
	return search.found;
}

// stay gives a flow the backend that its client had last, unless that is too long ago or gone.
//
// Subtle: the kernel may give what it keeps of a client that it forgets to another one at once. A backend that is read then is
// checked like any other.
static __always_inline int stay(int words, const __u64 *entry, __u64 service, const struct client *client, struct flow *flow)
{
	struct kept *kept = bpf_map_lookup_elem(&affinities, client);
	if (!kept)
		return 0;
	// Subtle: in this order, as another processor may be noting a later time.
	__u64 used = READ_ONCE(kept->used), now = bpf_ktime_get_ns();

	if (now - used > READ_ONCE(entry[AFFINITY_TIMEOUT]) >> 16)
		return 0;
	copy(flow->choice.backend, kept->backend);
	flow->choice.backend[0] |= (__u16)service;
	if (!has(words, entry, service, flow))
		return 0;
	kept->used = now;
	return 1;
}

// keep_for notes the backend of a flow for its client.
static __always_inline void keep_for(const struct client *client, const struct flow *flow)
{
	struct kept kept = { .used = bpf_ktime_get_ns() };

	copy(kept.backend, flow->choice.backend);
	kept.backend[0] &= ~0xffffULL;
	bpf_map_update_elem(&affinities, client, &kept, BPF_ANY);
}

static __always_inline int is_mapped(const union address6 *address)
{
	return !address->words[0] && address->parts[2] == bpf_htonl(0xffff);
}

// admits tells whether a frontend with RANGES is for a client.
static __always_inline int admits(const struct flow *flow, const union address6 *client)
{
	struct range key = { .length = 32 + sizeof(key.key) * 8 + 128, .address = *client };

	copy(key.key, flow->key);
	return bpf_map_lookup_elem(&ranges, &key) != NULL;
}

// source_of gives the address that packets of a socket would have, as far as it is known, or NULL.
//
// Subtle: the kernel may give what it keeps of a namespace to another one at once, while it is read. It has more room than nodes have pods.
static __always_inline const union address6 *source_of(void *ctx, int words)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	const struct namespace *namespace = bpf_map_lookup_elem(&namespaces, &cookie);

	if (!namespace) {
		bpf_ringbuf_output(&strangers, &cookie, sizeof(cookie), 0);
		return NULL;
	}
	const union address6 *source = &namespace->sources[words != KEY4];

	return source->words[0] || source->words[1] ? source : NULL;
}

// Each round is one look at a state that may be changing. Two rounds are rare, four are never seen.
#define ROUNDS 4

// choose gives a flow's frontend a backend. At the socket there is no address.
static __always_inline enum verdict choose(void *ctx, const union address6 *address, void *services, void *backends, int words,
					   struct flow *flow)
{
	__u64 hash = hash_of(flow->key, words);
	__u16 owner = owner_of(hash);

	for (int round = 0; round < ROUNDS; round++) {
		const __u64 *entry = find(services, flow->key, words, hash);
		if (!entry)
			return PASS;

		// Subtle: the entry may by now have been given to another frontend; the owner tells.
		__u64 service = READ_ONCE(entry[words]);
		if ((__u16)service != owner)
			continue;
		flow->choice.service = service;

		const union address6 *source = address;
		if (!address && service & (AFFINITY | RANGES))
			source = source_of(ctx, words);
		if (service & RANGES) {
			if (!source)
				return PASS; // packets have one
			if (!admits(flow, source))
				return DISCARD;
		}
		__u32 count = count_of(service);
		if (!count)
			return service & DROP ? DISCARD : REFUSE;

		struct client client = { .words = words };
		if (service & AFFINITY) {
			client.affinity = READ_ONCE(entry[AFFINITY_ID]);
			if (client.affinity & 0xffff)
				continue; // a backend is there by now
			if (source) {
				client.who[0] = source->words[0];
				client.who[1] = source->words[1];
				if (stay(words, entry, service, &client, flow))
					return TRANSLATE;
			}
			if (!address) {
				// Who it is without an address, and was before that was known.
				struct client namespace = { .who = { bpf_get_netns_cookie(ctx) }, .affinity = client.affinity, .words = words };

				if (stay(words, entry, service, &namespace, flow)) {
					if (source)
						keep_for(&client, flow);
					return TRANSLATE;
				}
				if (!source)
					client = namespace;
			}
		}

		// Multiplying high is uniform to within count / 2^32 and spares the division of random % count.
		__u32 index = base_of(service);
		if (count > 1)
			index += ((__u64)bpf_get_prandom_u32() * count) >> 32;
		if (!read_backend(backends, entry, words, index, flow->choice.backend))
			continue;
		// Subtle: a place that was given to another frontend since the service was read shows by its owner too, and
		// one that lost its backend holds zero.
		if ((__u16)flow->choice.backend[0] != owner)
			continue;
		flow->choice.index = index;
		if (service & AFFINITY)
			keep_for(&client, flow);
		return TRANSLATE;
	}
	return REFUSE;
}
