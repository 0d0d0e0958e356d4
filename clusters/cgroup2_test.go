// SPDX-License-Identifier: Apache-2.0

package clusters

import (
	"errors"
	"strings"
	"testing"
)

func TestCgroup2Mount(t *testing.T) {
	mixed := `24 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
`
	if got, err := cgroup2Mount(strings.NewReader(mixed)); err != nil || got != "/sys/fs/cgroup/unified" {
		t.Errorf("mixed host: %q, %v", got, err)
	}
	blank := "31 30 0:27 / /odd\\040place rw - cgroup2 none rw\n"
	if got, err := cgroup2Mount(strings.NewReader(blank)); err != nil || got != "/odd place" {
		t.Errorf("a mount point with a blank: %q, %v", got, err)
	}
	if _, err := cgroup2Mount(strings.NewReader("24 1 254:1 / / rw - ext4 /dev/root rw\n")); !errors.Is(err, ErrNotSupported) {
		t.Errorf("no cgroup2: %v does not wrap ErrNotSupported", err)
	}
}

func TestNamespaceIsEmptyAndDialsInside(t *testing.T) {
	ns, err := NewNetNS()
	if err != nil {
		t.Skipf("needs root: %v", err)
	}
	defer ns.Close()
	l, err := ns.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := ns.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatalf("dial inside: %v", err)
	}
	conn.Close()
	other, err := NewNetNS()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if conn, err := other.DialContext(t.Context(), "tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("a listener is reached from another namespace")
	}
	h, err := ns.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if link.Attrs().Name != "lo" && link.Attrs().OperState.String() == "up" {
			t.Errorf("a new namespace has link %s", link.Attrs().Name)
		}
	}
}
