// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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
	changed  chan struct{} // has room for one
}

func newSweeper(cfg Config, balancer *lb.Balancer) *sweeper {
	return &sweeper{balancer, cfg.Cgroup, make(chan struct{}, 1)}
}

// note says that endpoints over UDP have changed. A nil sweeper has nothing to do.
func (s *sweeper) note() {
	if s == nil {
		return
	}
	select {
	case s.changed <- struct{}{}:
	default:
	}
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
	seen := make(map[uint64]bool)
	err := filepath.WalkDir(s.cgroup, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil // a cgroup that is gone meanwhile
		}
		processes, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil // gone, or threaded: its processes are those of its parent
		}
		for pid := range strings.FieldsSeq(string(processes)) {
			ns := "/proc/" + pid + "/ns/net" // pid 0 is out of this container's sight, and has none
			if info, err := os.Stat(ns); err != nil {
				continue
			} else if inode := info.Sys().(*syscall.Stat_t).Ino; !seen[inode] {
				seen[inode] = true
				err := s.balancer.Forsake(ns)
				if errors.Is(err, lb.ErrNotSupported) {
					return err
				}
				if !errors.Is(err, os.ErrNotExist) { // else the process is gone
					errs = append(errs, err)
				}
			}
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}
