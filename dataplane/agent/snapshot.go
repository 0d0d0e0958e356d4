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

// snapshotPeriod is the least time between two writings of the file: it is for reboots, and costs more than a change does.
const snapshotPeriod = 10 * time.Second

// restore gives an empty load balancer what its node's file has. Whatever is wrong with that is logged, and Services then wait for the API
// server.
func restore(balancer *lb.Balancer, path, nodeName string) {
	for range balancer.Frontends() {
		return // pins are newer than the file
	}
	s, err := lb.ReadSnapshot(path, nodeName)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		klog.ErrorS(err, "Snapshot not used", "file", path)
		return
	}
	if err := balancer.Sync(s.Frontends); err != nil {
		klog.ErrorS(err, "Snapshot used in part", "file", path)
	}
	klog.InfoS("Serving by a snapshot until the API server answers", "file", path, "of", s.Time, "frontends", len(s.Frontends))
}

// A saver writes the file when something has changed, and not too often.
type saver struct {
	balancer       *lb.Balancer
	path, nodeName string
	status         *status
	changed        signal
}

func newSaver(cfg Config, balancer *lb.Balancer, status *status) *saver {
	return &saver{balancer, cfg.Snapshot, cfg.NodeName, status, newSignal()}
}

// note says that something changed. A nil saver saves nothing.
func (s *saver) note() {
	if s == nil {
		return
	}
	s.changed.give()
}

// run saves until ctx ends, and then what has changed last.
func (s *saver) run(ctx context.Context) {
	timer := time.NewTicker(snapshotPeriod)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			select {
			case <-s.changed:
				s.save()
			default:
			}
			return
		case <-s.changed:
			s.save()
		}
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
	}
}

func (s *saver) save() {
	frontends, err := s.balancer.Changes()
	if err == nil {
		err = lb.Snapshot{Time: time.Now(), Node: s.nodeName, Frontends: frontends}.Write(s.path)
	}
	if err != nil {
		s.status.snapshotErrors.Inc()
		klog.ErrorS(err, "Snapshot not written", "file", s.path)
	}
}
