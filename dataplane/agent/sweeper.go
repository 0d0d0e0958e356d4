// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// sweepPeriod is the least time between two looks at all UDP sockets, which takes as long as there are sockets.
const sweepPeriod = time.Second

// A sweeper has connected UDP sockets leave endpoints that are gone, in all network namespaces of the cgroup's processes.
type sweeper struct {
	balancer *lb.Balancer
	cgroup   string
	changed  signal
}

func newSweeper(cfg Config, balancer *lb.Balancer) *sweeper {
	return &sweeper{balancer, cfg.Cgroup, newSignal()}
}

// note says that endpoints over UDP have changed. A nil sweeper has nothing to do.
func (s *sweeper) note() {
	if s == nil {
		return
	}
	s.changed.give()
}

// run looks after each change until ctx ends, or the kernel turns out to lack what it takes.
func (s *sweeper) run(ctx context.Context) {
	pause := time.NewTicker(sweepPeriod)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.changed:
		}
		if err := s.sweep(); errors.Is(err, lb.ErrNotSupported) {
			klog.InfoS("Connected UDP sockets stay on endpoints that are gone", "reason", err)
			return
		} else if err != nil {
			klog.ErrorS(err, "Connected UDP sockets may stay on endpoints that are gone")
		}
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
	}
}

func (s *sweeper) sweep() error {
	var errs []error
	err := eachNetNS(s.cgroup, func(file string) error {
		err := s.balancer.Forsake(file)
		if errors.Is(err, lb.ErrNotSupported) || errors.Is(err, os.ErrNotExist) {
			return err
		}
		errs = append(errs, err)
		return nil
	})
	return errors.Join(append(errs, err)...)
}
