// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The socket half of the load balancer: connect(2) to a Service address becomes a connect(2) to one of its backends.
// dataplane/README.md draws the packet's way; table.go, word.go and sync.go write the maps that are read here.

#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_helpers.h>

// A frontend is what is looked up: eight bytes without padding, compared as one word.
struct frontend {
	__be32 address;
	__be16 port;
	__u8 protocol;
	__u8 scope; // 0: from inside the cluster
};

// An entry is what is known of a frontend, in one cache line: its key, its service word {base:32, count:16, owner:16}, and
// room for two sets of three backends, each a word {address:32, port:16, owner:16} with address and port in network byte
// order. The backends are count words from base: of the entry itself if base is below ENTRY_WORDS, else of the backends map.
// The service is one word because an update must be seen whole.
#define ENTRY_WORDS 8
#define KEY 0
#define SERVICE 1

// A bucket is a page of entries, so that a look-up touches one page. Its entries are probed from the one that the hash
// names, round and round, to the first that is empty.
#define BUCKET_ENTRIES 64

struct bucket {
	__u64 entries[BUCKET_ENTRIES][ENTRY_WORDS];
};

// The services are an open-addressing hash table. The element after its last bucket is for the process that writes it.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bucket);
	__uint(max_entries, (1 << 11) + 1);
	__uint(map_flags, BPF_F_MMAPABLE);
} services SEC(".maps");

// The backends of services that have more than three.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_MMAPABLE);
} backends SEC(".maps");

// Set before the program is loaded, and then constants to the verifier.
const volatile __u64 hash_seed;   // odd
const volatile __u32 bucket_mask; // buckets - 1

// hash_of is the multiply-shift hash of Dietzfelbinger et al. (1997), with a secret multiplier, so that nobody can choose
// Services that meet in one bucket, and a second round that spreads neighbouring addresses.
static __always_inline __u64 hash_of(__u64 key)
{
	__u64 hash = key * hash_seed;

	return (hash ^ hash >> 32) * 0x9e3779b97f4a7c15ULL;
}

// owner_of gives the 16 bits that mark what belongs to a frontend. They are never all zero, as what was not written is.
static __always_inline __u16 owner_of(__u64 hash)
{
	return hash >> 16 | 1;
}

// Subtle: words that another processor may be writing are read once.
#define READ_ONCE(word) (*(const volatile __u64 *)&(word))

// find gives the entry of a frontend, or NULL.
static __always_inline const __u64 *find(__u64 key, __u64 hash)
{
	__u32 index = (hash >> 40) & bucket_mask;
	const struct bucket *bucket = bpf_map_lookup_elem(&services, &index);
	if (!bucket)
		return NULL;

	for (__u32 probe = 0; probe < BUCKET_ENTRIES; probe++) {
		const __u64 *entry = bucket->entries[((hash >> 34) + probe) % BUCKET_ENTRIES];
		__u64 found = READ_ONCE(entry[KEY]);
		if (found == key)
			return entry;
		if (!found)
			return NULL;
	}
	return NULL;
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
	__u64 key = *(const __u64 *)&frontend;
	__u64 hash = hash_of(key);
	__u16 owner = owner_of(hash);

	for (int round = 0; round < ROUNDS; round++) {
		const __u64 *entry = find(key, hash);
		if (!entry)
			return 1; // not a Service: connect goes on as it was asked for

		// Subtle: the entry may by now have been given to another frontend; the owner tells.
		__u64 service = READ_ONCE(entry[SERVICE]);
		if ((__u16)service != owner)
			continue;

		__u32 count = (service >> 16) & 0xffff;
		if (!count)
			break;

		// Multiplying high is uniform to within count / 2^32 and spares the division of random % count.
		__u32 index = service >> 32;
		if (count > 1)
			index += ((__u64)bpf_get_prandom_u32() * count) >> 32;

		// Subtle: a place that was given to another frontend since the service was read shows by its owner too, and
		// one that lost its backend holds zero.
		__u64 backend;
		if (index < ENTRY_WORDS) {
			backend = READ_ONCE(entry[index]);
		} else {
			const __u64 *slot = bpf_map_lookup_elem(&backends, &index);
			if (!slot)
				continue;
			backend = READ_ONCE(*slot);
		}
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
