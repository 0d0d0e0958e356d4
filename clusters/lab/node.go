// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

const apiServerLocal = "127.0.0.1:6443"

// node is one network namespace with a client pod and backend pods behind veth pairs, and the mode's proxy.
type node struct {
	spec clusters.ProxySpec
	run  *host.Run
	dir  string
	// program is the plimsoll binary that runs in pods and as the agent.
	program string
	ns      *clusters.NetNS
	// outside is the far end of the node's uplink.
	outside  *clusters.NetNS
	cgroup   *host.Cgroup
	client   *pod
	backends []*pod
	proxy    *host.Process
	// proxyGroup is nil without a proxy.
	proxyGroup *host.Cgroup
	iptables   string
	forwarder  net.Listener

	mu      sync.Mutex // guards what follows
	stopped bool       // the proxy's end is wanted
	err     error      // why the proxy does not serve, when more is known than how it ended
}

var (
	_ clusters.Site     = (*node)(nil)
	_ clusters.Outsider = (*node)(nil)
)

func newNode(r *host.Run, program string, spec clusters.ProxySpec) (*node, error) {
	n := &node{spec: spec, run: r, program: program, dir: filepath.Join(r.Dir, spec.Name)}
	if err := n.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("node %s: %w", spec.Name, err), n.close(context.Background()))
	}
	return n, nil
}

func (n *node) build() error {
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	var err error
	if n.cgroup, err = n.run.Cgroup.Child("node-" + n.spec.Name); err != nil {
		return err
	}
	if n.ns, err = newNetNS(); err != nil {
		return err
	}
	if err := n.addUplink(); err != nil {
		return err
	}
	// Subtle: a pod forwards to the node and the node to the pod, so only the node's namespace forwards. The settings are
	// the namespace's own.
	for _, name := range each(func(f family) string { return f.forwarding }) {
		if err := sysctl(n.ns, name, "1"); err != nil {
			return fmt.Errorf("node %s: %w", n.spec.Name, err)
		}
	}
	if n.client, err = n.addPod("client", each(func(f family) home { return home{f, f.client, single(f.client)} })...); err != nil {
		return err
	}
	for i := range ipv4.backends {
		b, err := n.addPod(fmt.Sprintf("backend-%d", i), each(func(f family) home { return home{f, f.backends[i].Addr().Next(), f.backends[i]} })...)
		if err != nil {
			return err
		}
		n.backends = append(n.backends, b)
	}
	return nil
}

// addUplink gives the node its addresses on eth0 and default routes there. The other end lies in a namespace without an address
// or a route, which drops what arrives: there is no way out. Without a route a Service's address would be unreachable before
// the packet comes to the hooks where kube-proxy rejects it.
func (n *node) addUplink() error {
	var err error
	if n.outside, err = newNetNS(); err != nil {
		return err
	}
	h, err := n.ns.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	far, err := n.outside.Netlink()
	if err != nil {
		return err
	}
	defer far.Close()
	near, peer, err := addVeth(h, far, "eth0", "uplink", n.outside)
	if err != nil {
		return err
	}
	for _, f := range families() {
		if err := h.AddrAdd(near, address(f.node)); err != nil {
			return fmt.Errorf("add the node's address %s: %w", f.node, err)
		}
		if err := routeBy(h, near, f.router, peer); err != nil {
			return err
		}
	}
	return nil
}

// routeBy lays a default route by way of a router on link, whose address on the link is peer's.
func routeBy(h *netlink.Handle, link netlink.Link, router netip.Addr, peer netlink.Link) error {
	if err := pinNeighbour(h, link, router, peer); err != nil {
		return err
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: router.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
		return fmt.Errorf("add the default route by %s: %w", router, err)
	}
	return nil
}

// pinNeighbour tells link for good that peer is who has an address: an exchange of ARP or neighbour discovery in the middle of a visit
// would be an outlier that has nothing to do with Services.
func pinNeighbour(h *netlink.Handle, link netlink.Link, a netip.Addr, peer netlink.Link) error {
	err := h.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: peer.Attrs().HardwareAddr})
	if err != nil {
		return fmt.Errorf("pin the link address of %s: %w", a, err)
	}
	return nil
}

// address is one for a link, usable at once: nobody else can have it, so IPv6 need not ask whether somebody does.
func address(a netip.Addr) *netlink.Addr {
	made := &netlink.Addr{IPNet: ipNet(single(a))}
	if a.Is6() {
		made.Flags = unix.IFA_F_NODAD
	}
	return made
}

// newNetNS makes a network namespace that speaks all families, whatever the host's default for new ones is.
func newNetNS() (*clusters.NetNS, error) {
	ns, err := clusters.NewNetNS()
	if err != nil || len(families()) == 1 {
		return ns, err
	}
	for _, name := range []string{"net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6"} {
		if err := sysctl(ns, name, "0"); err != nil {
			return nil, errors.Join(err, ns.Close())
		}
	}
	return ns, nil
}

// addVeth makes a pair of links, near in h's namespace and far in the other one, sets both up, and returns them with their
// link addresses.
func addVeth(h, other *netlink.Handle, nearName, farName string, to *clusters.NetNS) (near, far netlink.Link, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = nearName
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: farName, PeerNamespace: netlink.NsFd(to.Fd())}); err != nil {
		return nil, nil, fmt.Errorf("add veth %s: %w", nearName, err)
	}
	if near, err = setUp(h, nearName); err != nil {
		return nil, nil, err
	}
	far, err = setUp(other, farName)
	return near, far, err
}

func setUp(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set link %s up: %w", name, err)
	}
	return link, nil
}

// sysctl sets a value that a namespace has of its own.
func sysctl(ns *clusters.NetNS, name, value string) error {
	return ns.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
}

func (n *node) Spec() clusters.ProxySpec   { return n.spec }
func (n *node) Enter(f func() error) error { return n.ns.Do(f) }
func (n *node) IPTables() string           { return n.iptables }
func (n *node) Client() clusters.Pod       { return n.client }

func (n *node) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return n.ns.DialContext(ctx, network, address)
}

func (n *node) Backends() []clusters.Pod {
	pods := make([]clusters.Pod, len(n.backends))
	for i, b := range n.backends {
		pods[i] = b
	}
	return pods
}

// EndpointPrefixes are the same on every node, and IPv4's, as fleets are.
func (n *node) EndpointPrefixes() []netip.Prefix { return ipv4.backends }

func (n *node) ProxyCgroup() string {
	if n.proxyGroup == nil {
		return ""
	}
	return n.proxyGroup.Dir
}

func (n *node) Freeze(ctx context.Context, frozen bool) error {
	return n.cgroup.Freeze(ctx, frozen)
}

// close lets go of the node. Its processes end with the run's cgroup; its namespaces and links with its processes.
func (n *node) close(ctx context.Context) error {
	var errs []error
	if n.forwarder != nil {
		errs = append(errs, n.forwarder.Close())
	}
	if n.cgroup != nil {
		errs = append(errs, n.cgroup.Remove(ctx))
	}
	for _, p := range append([]*pod{n.client}, n.backends...) {
		if p != nil {
			errs = append(errs, p.ns.Close())
		}
	}
	for _, ns := range []*clusters.NetNS{n.outside, n.ns} {
		if ns != nil {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}

// forward gives the node a way to the API server. The listening socket is opened in the node's namespace, so nothing of it is
// on the host.
func (n *node) forward(control API) error {
	l, err := n.ns.Listen(context.Background(), apiServerLocal)
	if err != nil {
		return fmt.Errorf("node %s: listen for the API server: %w", n.spec.Name, err)
	}
	n.forwarder = l
	go control.Forward(l)
	return nil
}
