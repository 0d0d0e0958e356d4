// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

// maxNamespaces is more network namespaces than a node has pods, and strangersBytes room for the cookies of those that are not looked at yet.
const (
	maxNamespaces  = 1 << 12
	strangersBytes = 1 << 16
)

// Sources are the addresses that packets from a network namespace have as their source. One that is not valid is none.
type Sources struct {
	IPv4, IPv6 netip.Addr
}

// words are Sources in the map: struct namespace in services.h.
func (s Sources) words() (w [2][16]byte) {
	for i, a := range []netip.Addr{s.IPv4, s.IPv6} {
		if a.IsValid() {
			w[i] = a.As16()
		}
	}
	return w
}

// SetSources has the socket hooks take processes of the network namespace with that cookie (SO_NETNS_COOKIE) for the client that packets from there are:
// for session affinity and for ranges of clients. What is set for a namespace that has ended is forgotten when room is wanted.
func (b *Balancer) SetSources(cookie uint64, s Sources) error {
	want, has := s.words(), [2][16]byte{}
	if err := b.namespaces.Lookup(cookie, &has); err == nil && has == want {
		return nil // what hooks may be reading stays
	}
	if err := b.namespaces.Put(cookie, want); err != nil {
		return fmt.Errorf("sources of a network namespace: %w", err)
	}
	return nil
}

// OnStrangers calls met when a socket hook has asked for the sources of a network namespace that are not set, until ctx ends, which is no
// error.
func (b *Balancer) OnStrangers(ctx context.Context, met func()) error {
	cookies, err := ringbuf.NewReader(b.objects.Strangers)
	if err != nil {
		return fmt.Errorf("watch for network namespaces: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cookies.Close() })
	defer stop()
	for {
		record, err := cookies.Read()
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return errors.Join(fmt.Errorf("watch for network namespaces: %w", err), cookies.Close())
		}
		// Others may have been met while met was at work.
		var has [2][16]byte
		if err := b.namespaces.Lookup(record.RawSample[:8], &has); errors.Is(err, ebpf.ErrKeyNotExist) {
			met()
		}
	}
}
