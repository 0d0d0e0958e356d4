// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// An ipv6 knows whether the node has IPv6. Its Services are carried either way: a node can get it at any time, and pods may have it where
// the node has none.
type ipv6 struct {
	netNS string
	off   atomic.Bool
}

func (i *ipv6) isOff() bool { return i.off.Load() }

// run looks each canaryPeriod until ctx ends.
func (i *ipv6) run(ctx context.Context) {
	again := time.NewTicker(canaryPeriod)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
			i.look()
		}
	}
}

// look finds out what is, and says what has changed.
func (i *ipv6) look() {
	var off bool
	err := lb.InNetNS(i.netNS, func() (err error) { off, err = lb.IsIPv6Off(); return err })
	switch {
	case err != nil:
		klog.ErrorS(err, "Not known whether IPv6 is off on this node")
	case i.off.Swap(off) == off:
	case off:
		klog.InfoS("IPv6 is off on this node: nobody reaches Services by it here before it is on")
	default:
		klog.InfoS("IPv6 is on again on this node")
	}
}
