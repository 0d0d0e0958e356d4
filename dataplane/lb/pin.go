// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// layout names the folder of the pins. It changes with what the words in the maps mean.
const layout = "v7"

// maxStreams is how many connected TCP sockets have the names of their peers in a map of their own: STREAMS of socket.bpf.c.
const maxStreams = 1 << 16

func (b *Balancer) pinDir() string        { return filepath.Join(b.options.PinDir, layout) }
func (b *Balancer) linkPin(h hook) string { return filepath.Join(b.pinDir(), h.name) }

// layouts matches the folders of all layouts, and those that setAside made.
var layouts = regexp.MustCompile(`^v[0-9]+(-[0-9]+)?$`)

// setAside gives the folder of pins another name, by which it is one of another layout. Its links are the same.
func (b *Balancer) setAside() error {
	for i := 1; ; i++ {
		aside := fmt.Sprint(b.pinDir(), "-", i)
		if _, err := os.Stat(aside); err == nil {
			continue
		}
		if err := os.Rename(b.pinDir(), aside); err != nil {
			return fmt.Errorf("set pins aside: %w", err)
		}
		return nil
	}
}

// Supersede removes what Balancers of other layouts or sizes pinned under the PinDir, whose programs would go on translating by maps that
// nobody keeps. Until it is called they serve what this one does not know yet. Without a PinDir there is nothing to do.
func (b *Balancer) Supersede() error {
	if b.options.PinDir == "" {
		return nil
	}
	return removeLayouts(b.options.PinDir, layout)
}

// removeLayouts removes the folders of all layouts but one under a pin folder, which need not be there.
func removeLayouts(pinDir, but string) error {
	entries, err := os.ReadDir(pinDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for pins: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && e.Name() != but && layouts.MatchString(e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(pinDir, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// removePin removes one pin, which need not be there.
func removePin(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove a pin: %w", err)
	}
	return nil
}

// replacePinned puts a hook's program in the place of the one that a pinned link attached to cgroup. It returns nil if
// there is none. A pinned link to another cgroup, or to one that is gone, is removed.
func (b *Balancer) replacePinned(h hook, cgroup string) (link.Link, error) {
	l, err := link.LoadPinnedLink(b.linkPin(h), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the pinned link: %w", err)
	}
	same, err := attachedTo(l, cgroup)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if !same {
		if err := errors.Join(l.Unpin(), l.Close()); err != nil {
			return nil, fmt.Errorf("remove the pinned link to another cgroup: %w", err)
		}
		return nil, nil
	}
	if err := l.Update(h.program); err != nil {
		return nil, errors.Join(fmt.Errorf("replace the program: %w", err), l.Close())
	}
	return l, nil
}

// attachedTo tells whether a link is attached to a cgroup, whose id is its folder's inode number.
func attachedTo(l link.Link, cgroup string) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	var folder unix.Stat_t
	if err := unix.Stat(cgroup, &folder); err != nil {
		return false, fmt.Errorf("stat %s: %w", cgroup, err)
	}
	at := info.Cgroup()
	return at != nil && at.CgroupId == folder.Ino, nil
}
