// SPDX-License-Identifier: Apache-2.0

// Cni is the pod network of a node that was built without a registry: it writes a CNI configuration for the node's pod ranges,
// keeps a route to every other node's, and masquerades what leaves the pod network.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/knftables"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cni:", err)
		os.Exit(1)
	}
}

// protocol marks the routes of this program among a node's (rtnetlink(7); the numbers from 187 on are nobody's).
const protocol = 187

// network is what the program knows of the node that it runs on.
type network struct {
	node    string
	subnets []netip.Prefix // the pod ranges of all nodes together
	confDir string
	nodes   corelisters.NodeLister
}

func run(ctx context.Context) error {
	n := network{node: os.Getenv("NODE_NAME"), confDir: "/etc/cni/net.d"}
	for word := range strings.SplitSeq(os.Getenv("POD_SUBNET"), ",") {
		subnet, err := netip.ParsePrefix(word)
		if err != nil {
			return fmt.Errorf("POD_SUBNET: %w", err)
		}
		n.subnets = append(n.subnets, subnet)
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	// The API server's Service answers only once a proxy runs, which itself may wait for the network.
	if endpoint := os.Getenv("CONTROL_PLANE_ENDPOINT"); endpoint != "" {
		config.Host = "https://" + endpoint
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	if err := n.masquerade(ctx); err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	change := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	n.nodes = factory.Core().V1().Nodes().Lister()
	if _, err := factory.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { change() }, UpdateFunc: func(any, any) { change() }, DeleteFunc: func(any) { change() },
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		if err := n.sync(); err != nil {
			fmt.Fprintln(os.Stderr, "cni:", err)
			time.AfterFunc(time.Second, change)
		}
	}
}

// sync brings configuration and routes to what the cluster's nodes are.
func (n network) sync() error {
	nodes, err := n.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	wanted := map[string]netlink.Route{}
	for _, node := range nodes {
		ranges, err := podRanges(node)
		if err != nil {
			return err
		}
		if node.Name == n.node {
			if err := n.configure(ranges); err != nil {
				return err
			}
			continue
		}
		for _, r := range ranges {
			gateway := address(node, r.Addr().Is4())
			if gateway == nil {
				continue
			}
			wanted[r.String()] = netlink.Route{Dst: ipNet(r), Gw: gateway, Protocol: protocol}
		}
	}
	have, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: protocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	var errs []error
	for _, route := range have {
		want, ok := wanted[route.Dst.String()]
		if ok && want.Gw.Equal(route.Gw) {
			delete(wanted, route.Dst.String())
			continue
		}
		if !ok {
			errs = append(errs, netlink.RouteDel(&route))
		}
	}
	for _, route := range wanted {
		if err := netlink.RouteReplace(&route); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("route to %s by %s: %w", route.Dst, route.Gw, err))
		}
	}
	return errors.Join(errs...)
}

// podRanges are a node's; none until the controller manager has given it some.
func podRanges(node *corev1.Node) ([]netip.Prefix, error) {
	ranges := make([]netip.Prefix, 0, len(node.Spec.PodCIDRs))
	for _, word := range node.Spec.PodCIDRs {
		r, err := netip.ParsePrefix(word)
		if err != nil {
			return nil, fmt.Errorf("pod range of node %s: %w", node.Name, err)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

// address is a node's internal address of a family; nil when it has none.
func address(node *corev1.Node, v4 bool) net.IP {
	for _, a := range node.Status.Addresses {
		if ip := net.ParseIP(a.Address); a.Type == corev1.NodeInternalIP && ip != nil && (ip.To4() != nil) == v4 {
			return ip
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// configure writes the node's CNI configuration; the container runtime sees the node as ready from then on.
func (n network) configure(ranges []netip.Prefix) error {
	if len(ranges) == 0 {
		return nil
	}
	type object = map[string]any
	var sets [][]object
	var routes []object
	for _, r := range ranges {
		sets = append(sets, []object{{"subnet": r.String()}})
		everywhere := "0.0.0.0/0"
		if r.Addr().Is6() {
			everywhere = "::/0"
		}
		routes = append(routes, object{"dst": everywhere})
	}
	b, err := json.MarshalIndent(object{
		"cniVersion": "1.0.0", "name": "plimsoll",
		"plugins": []object{
			{"type": "ptp", "ipam": object{"type": "host-local", "dataDir": "/run/cni-ipam-state", "ranges": sets, "routes": routes}},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	}, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(n.confDir, "10-plimsoll.conflist")
	if old, err := os.ReadFile(file); err == nil && string(old) == string(b) {
		return nil
	}
	if err := os.WriteFile(file+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// masquerade gives what pods send out of the pod network the node's address, on which answers find back.
func (n network) masquerade(ctx context.Context) error {
	for _, family := range []knftables.Family{knftables.IPv4Family, knftables.IPv6Family} {
		var inside []string
		for _, s := range n.subnets {
			if s.Addr().Is4() == (family == knftables.IPv4Family) {
				inside = append(inside, s.String())
			}
		}
		if len(inside) == 0 {
			continue
		}
		nft, err := knftables.New(family, "plimsoll-cni")
		if err != nil {
			return fmt.Errorf("reach nft: %w", err)
		}
		tx := nft.NewTransaction()
		tx.Add(&knftables.Table{Comment: knftables.PtrTo("masquerades what leaves the pod network")})
		tx.Add(&knftables.Chain{Name: "postrouting", Type: knftables.PtrTo(knftables.NATType), Hook: knftables.PtrTo(knftables.PostroutingHook), Priority: knftables.PtrTo(knftables.SNATPriority)})
		tx.Flush(&knftables.Chain{Name: "postrouting"})
		for _, s := range inside {
			tx.Add(&knftables.Rule{Chain: "postrouting", Rule: knftables.Concat(family, "saddr", s, family, "daddr", "!= {", strings.Join(inside, ", "), "}", "masquerade")})
		}
		if err := nft.Run(ctx, tx); err != nil {
			return fmt.Errorf("masquerade: %w", err)
		}
	}
	return nil
}
