// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
)

func TestVisitorsReachTheNodeAndItsPods(t *testing.T) {
	l := mustCreate(t, testPlan(t, "visitors", labtest.Bin(t, testBin), clusters.ProxySpec{Name: "direct"}))
	n := l.nodes[0]
	outsider, err := n.Outsider(netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("2001:db8::9"))
	if err != nil {
		t.Fatal(err)
	}
	hostPod, err := HostPod(n)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(hostPod.Cgroup(), n.cgroup.Dir+"/") || strings.HasPrefix(outsider.Cgroup(), n.cgroup.Dir+"/") {
		t.Errorf("the host pod is in %s, and the outsider in %s, the node being %s", hostPod.Cgroup(), outsider.Cgroup(), n.cgroup.Dir)
	}
	for _, server := range []*pod{n.backends[0], hostPod.(*pod)} {
		for _, client := range []*pod{outsider.(*pod), hostPod.(*pod)} {
			for i := range families() {
				address := net.JoinHostPort(server.addresses[i].String(), "8080")
				listener, err := server.ns.Listen(t.Context(), address)
				if err != nil {
					t.Fatal(err)
				}
				conn, err := client.ns.DialContext(t.Context(), "tcp", address)
				if err != nil {
					t.Fatalf("%s to %s: %v", client.name, address, err)
				}
				if got := conn.LocalAddr().(*net.TCPAddr).IP.String(); got != client.addresses[i].String() {
					t.Errorf("%s has address %s at %s, want %s", client.name, got, server.name, client.addresses[i])
				}
				conn.Close()
				listener.Close()
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if conn, err := n.client.ns.DialContext(ctx, "tcp", "192.0.2.1:80"); err == nil {
		conn.Close()
		t.Error("with an outsider a pod reached an address outside the lab")
	}
}
