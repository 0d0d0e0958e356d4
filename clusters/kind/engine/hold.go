// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// imageCache is where podman's library keeps what it learns of images: a path that it has built in for root, beside the store that the
// configuration names.
const imageCache = "/var/lib/containers"

// ready is the line by which Hold says that the namespaces stand.
const ready = "ready\n"

// Hold turns the namespaces that this process was started in into the engine's: the unpacked packages lie over the host's /usr
// and /etc, what would be left outside of the cache is in memory, this process's own. It returns when ctx ends.
func Hold(ctx context.Context, dir string) error {
	if err := os.MkdirAll(imageCache, 0o700); err != nil {
		return err
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"overlay", "/usr", "overlay", 0, "lowerdir=" + filepath.Join(dir, "root/usr") + ":/usr"},
		{"overlay", "/etc", "overlay", 0, "lowerdir=" + filepath.Join(dir, "root/etc") + ":/etc"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"tmpfs", imageCache, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=700"},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	// Where the kernel has br_netfilter, what one container sends another by their network's bridge would pass the engine's rules, which take
	// what is not for an address of the network's own, but for a pod of a node's, for something that leaves it, and masquerade it. The host's own
	// settings stay: each network namespace has its own (since Linux 5.3).
	for _, family := range []string{"iptables", "ip6tables", "arptables"} {
		if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+family, []byte("0"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("leave bridges alone: %w", err)
		}
	}
	if _, err := os.Stdout.WriteString(ready); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}
