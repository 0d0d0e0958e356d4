// SPDX-License-Identifier: Apache-2.0

// Package dataplane is what carries Services: one file a mode, each of which says what it wants of its node and reads back
// what the kernel holds.
package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// Settings are what all modes of a run share.
type Settings struct {
	// ProxyDefaults leaves every proxy at its own defaults; otherwise all have LikeForLike.
	ProxyDefaults bool
	// PeerNames has mode ebpf tell getpeername(2) of Services, which costs something.
	PeerNames bool
}

// LikeForLike is the minSyncPeriod of every proxy in a run that compares them like for like.
const LikeForLike = 10 * time.Millisecond

// minSyncPeriod is nil where a proxy keeps its own default.
func (s Settings) minSyncPeriod() *time.Duration {
	if s.ProxyDefaults {
		return nil
	}
	d := LikeForLike
	return &d
}

// A Mode is a way in which a node carries Services.
type Mode interface {
	// Name is the word after --modes.
	Name() string
	// Doc is one line for `plimsoll list`.
	Doc() string
	// Floor names the mode that this one is held against; empty for the floors themselves.
	Floor() string
	// Supported says what this host lacks for the mode, wrapping clusters.ErrNotSupported; nil when nothing. It leaves
	// nothing behind.
	Supported(ctx context.Context) error
	// Spec is what the mode wants of its node.
	Spec(s Settings) clusters.ProxySpec
	// Programmed counts the Service ports that the node's rules or maps hold, the API server's own Service among them; 0 on
	// floors.
	Programmed(ctx context.Context, site clusters.Site) (int, error)
	// Chain lists the Service ports in the order in which the kernel tries them for a new connection; nil in modes that
	// look Services up.
	Chain(ctx context.Context, site clusters.Site) ([]netip.AddrPort, error)
}

// Modes are all modes, in the order in which reports list them.
var Modes = []Mode{
	direct{},
	directConntrack{},
	iptables{},
	iptablesLegacy{},
	ipvs{},
	nftables{},
	ebpf{},
	ebpfPacket{},
}

// Floor is the name of the mode without a Service or conntrack.
var Floor = direct{}.Name()

// Find is the mode of that name. The error lists the names that there are.
func Find(name string) (Mode, error) {
	names := make([]string, len(Modes))
	for i, m := range Modes {
		if m.Name() == name {
			return m, nil
		}
		names[i] = m.Name()
	}
	return nil, fmt.Errorf("mode %q is not one of %s", name, strings.Join(names, ", "))
}

// complaint is the last line that a failed command printed: where tools say what was wrong.
func complaint(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// inScratch runs f in a network namespace of its own that is gone afterwards, so that probing a host changes nothing there.
func inScratch(f func() error) error {
	ns, err := clusters.NewNetNS()
	if err != nil {
		return err
	}
	return errors.Join(ns.Do(f), ns.Close())
}
