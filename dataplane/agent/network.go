// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"
	"k8s.io/kubernetes/pkg/proxy/conntrack"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// A LocalMode is how clients inside the cluster are told from those outside. The names are kube-proxy's.
type LocalMode string

// The modes that there are. Without one all clients are taken for outside ones, and none is masqueraded at a ClusterIP.
const (
	NoLocalMode         LocalMode = ""
	ClusterCIDR         LocalMode = "ClusterCIDR"         // by Local.CIDRs
	NodeCIDR            LocalMode = "NodeCIDR"            // by the node's spec.podCIDRs
	BridgeInterface     LocalMode = "BridgeInterface"     // by the bridge Local.Interface, where their packets arrive
	InterfaceNamePrefix LocalMode = "InterfaceNamePrefix" // by devices whose names begin with Local.Interface
)

// LocalModes are all of them but the first.
var LocalModes = []LocalMode{ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix}

// A Local says which clients are inside the cluster.
type Local struct {
	Mode      LocalMode
	CIDRs     []netip.Prefix // for ClusterCIDR alone
	Interface string
}

func (l Local) validate() error {
	switch l.Mode {
	case NoLocalMode, NodeCIDR:
		return nil
	case ClusterCIDR:
		if len(l.CIDRs) == 0 {
			return fmt.Errorf("agent: local mode %s wants the cluster's pod CIDRs", l.Mode)
		}
		return nil
	case BridgeInterface, InterfaceNamePrefix:
		if l.Interface == "" {
			return fmt.Errorf("agent: local mode %s wants the name of an interface", l.Mode)
		}
		return nil
	}
	return fmt.Errorf("agent: local mode %q is not one of %v", l.Mode, LocalModes)
}

// A network is what the agent does in the node's network namespace: it attaches the packet programs to devices as they come, and
// keeps conntrack in step. All of it happens on one thread, which is in that namespace.
type network struct {
	cfg      Config
	balancer *lb.Balancer
	work     chan func()
	done     chan struct{}

	mu       sync.Mutex       // guards what follows
	cidrs    []string         // nil until they are known
	complete bool             // whether all Services are carried
	fault    map[string]error // what is lacking, by what that is

	// The thread's own.
	attached  map[int]attachment // by the device's index
	subscribe func(chan<- netlink.LinkUpdate, <-chan struct{}, netlink.LinkSubscribeOptions) error
}

var (
	_ proxyconfig.NodeHandler        = (*network)(nil)
	_ proxyconfig.ServiceCIDRHandler = (*network)(nil)
)

// startNetwork attaches the packet programs to the devices that are there, and to those that come until ctx ends.
func startNetwork(ctx context.Context, cfg Config, balancer *lb.Balancer) (*network, error) {
	n := &network{
		cfg: cfg, balancer: balancer, work: make(chan func()), done: make(chan struct{}), attached: make(map[int]attachment),
		subscribe: netlink.LinkSubscribeWithOptions,
	}
	var insiders []netip.Prefix // those of ClusterCIDR are no insiders by another mode, as with kube-proxy
	if cfg.Local.Mode == ClusterCIDR {
		insiders = cfg.Local.CIDRs
	}
	if cfg.Local.Mode != NodeCIDR { // else what a former agent knew is true until the node has been seen
		if err := balancer.SetInsiders(insiders); err != nil {
			return nil, err
		}
	}
	started := make(chan error, 1)
	go func() {
		defer close(n.done)
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, and its namespace with it
		n.run(ctx, started)
	}()
	if err := <-started; err != nil {
		<-n.done
		return nil, fmt.Errorf("packet path: %w", err)
	}
	return n, nil
}

// run tells started how the beginning went, and then works until ctx ends.
func (n *network) run(ctx context.Context, started chan<- error) {
	links, stop := make(chan netlink.LinkUpdate), make(chan struct{})
	defer close(stop)
	// Subtle: watched before they are listed, so that none is missed.
	err := lb.EnterNetNS(n.cfg.NetNS)
	if err == nil {
		err = n.watch(links, stop)
	}
	if err == nil {
		err = n.attachAll()
	}
	if err == nil {
		n.keepLoop() // before KeepDevices, which takes what a former agent attached to a loop that is not kept
		err = n.balancer.KeepDevices()
	}
	started <- err
	if err != nil {
		go drain(links)
		return
	}
	canary := time.NewTicker(canaryPeriod)
	defer canary.Stop()
	for {
		select {
		case <-ctx.Done():
			go drain(links)
			return
		case f := <-n.work:
			f()
		case <-canary.C:
			n.restoreNAT()
			n.keepLoop()
			if links == nil {
				links = n.rewatch(stop)
			} else if n.lacks(attaching) {
				n.attachAnew()
			}
		case update, open := <-links:
			if !open {
				// The kernel dropped messages, or the socket broke: what there is tells all that was missed.
				links = n.rewatch(stop)
				continue
			}
			n.linkChanged(update)
		}
	}
}

// What the packet path may lack, until a canary finds it mended.
const (
	watching  = "devices are not watched"
	attaching = "a device is not attached to"
	nat       = "the nftables table may be missing"
	looping   = "there is no loop, so the node's own processes reach Services by their sockets alone"
)

// rewatch watches devices anew and attaches to all that there are. It returns nil if they cannot be watched, for the next canary to try.
func (n *network) rewatch(stop <-chan struct{}) chan netlink.LinkUpdate {
	links := make(chan netlink.LinkUpdate)
	err := n.watch(links, stop)
	n.lack(watching, err)
	if err != nil {
		klog.ErrorS(err, "Devices not watched: those that come are not attached to before this is tried again", "retry", canaryPeriod)
		links = nil
	}
	n.attachAnew()
	return links
}

// attachAnew attaches to all devices that want it.
func (n *network) attachAnew() {
	err := n.attachAll()
	n.lack(attaching, err)
	if err != nil {
		klog.ErrorS(err, "Devices not attached to: clients behind them reach no Services by packets", "retry", canaryPeriod)
	}
}

// lack notes that something is lacking because of an error, or no longer is if there is none.
func (n *network) lack(what string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil {
		delete(n.fault, what)
		return
	}
	if n.fault == nil {
		n.fault = make(map[string]error)
	}
	n.fault[what] = err
}

func (n *network) lacks(what string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.fault[what] != nil
}

// faults are what is lacking, sorted. A nil network lacks nothing.
func (n *network) faults() (all []string) {
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for what, err := range n.fault {
		all = append(all, fmt.Sprintf("%s: %v", what, err))
	}
	slices.Sort(all)
	return all
}

// harmed tells whether more is lacking than the loop, without which all packets but the node's own go their way.
func (n *network) harmed() bool {
	return n != nil && (n.lacks(watching) || n.lacks(attaching) || n.lacks(nat))
}

// canaryPeriod is how often the nftables table and the loop are looked for, and what is lacking is tried again. kube-proxy looks for its iptables chains
// every 30 s. Guests wait for longer before they count (putOff in scenarios): a young table becomes another.
const canaryPeriod = 10 * time.Second

// restoreNAT brings the nftables table back after somebody has flushed all rules, and makes one whole that is young.
func (n *network) restoreNAT() {
	has, err := n.balancer.HasNAT()
	if err == nil && !has {
		klog.InfoS("The agent's nftables table was removed by somebody: installed anew")
	}
	if err == nil && !(has && n.balancer.DropsInvalid()) {
		err = keepNAT(n.balancer)
	}
	n.lack(nat, err)
	if err != nil {
		klog.ErrorS(err, "The agent's nftables table may be missing: packets are not translated without it")
	}
}

// keepNAT installs the nftables table. Before that drops what is invalid, and while nothing is lost by it, connection tracking forgets what
// would make it so.
func keepNAT(balancer *lb.Balancer) error {
	if has, err := balancer.HasNAT(); err == nil && has && !balancer.DropsInvalid() {
		forgotten, err := balancer.ForgetPickedUp()
		if err != nil {
			klog.ErrorS(err, "Connections from before connection tracking not forgotten: a client that takes the port of one again may wait some seconds")
		}
		if forgotten > 0 {
			klog.InfoS("Connection tracking has forgotten connections that it met in their middle and that were reset", "connections", forgotten)
		}
	}
	return balancer.KeepNAT()
}

// keepLoop has the node's own processes reach Services by packets. Where that cannot be the others do all the same.
func (n *network) keepLoop() {
	err := n.balancer.KeepLoop()
	if err != nil && !n.lacks(looping) {
		klog.ErrorS(err, "No loop: the node's own processes reach Services by their sockets alone")
	}
	n.lack(looping, err)
}

// drain lets the sender of a channel that nobody reads go on to its end. A nil channel has none.
func drain(links <-chan netlink.LinkUpdate) {
	if links == nil {
		return
	}
	for range links {
	}
}

func (n *network) watch(links chan netlink.LinkUpdate, stop <-chan struct{}) error {
	options := netlink.LinkSubscribeOptions{ErrorCallback: func(err error) {
		select {
		case <-stop: // which ends it by an error
		default:
			klog.ErrorS(err, "Devices are watched anew")
		}
	}}
	if err := n.subscribe(links, stop, options); err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	return nil
}

func (n *network) attachAll() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, link := range links {
		errs = append(errs, n.attach(link.Attrs()))
	}
	return errors.Join(errs...)
}

func (n *network) linkChanged(update netlink.LinkUpdate) {
	if update.IfInfomsg.Family != unix.AF_UNSPEC {
		return // a bridge's, about a port that comes or goes: the device is there all the same
	}
	attrs := update.Link.Attrs()
	var err error
	if update.Header.Type == unix.RTM_DELLINK {
		if lb.IsLoop(attrs.Name) {
			klog.InfoS("The loop was removed by somebody: made anew", "device", attrs.Name)
			n.keepLoop()
			return
		}
		delete(n.attached, attrs.Index)
		err = n.balancer.DetachDevice(attrs.Index)
	} else {
		err = n.attach(attrs)
	}
	if err != nil {
		n.lack(attaching, err)
		klog.ErrorS(err, "Device not attached to: clients behind it reach no Services by packets", "device", attrs.Name)
	}
}

// An attachment is what a device was when its program was attached.
type attachment struct {
	name string
	pods bool
}

// attach attaches to a device that is wanted, and detaches from one that is no more. One that has become another, as a port of a bridge, is
// attached to anew.
func (n *network) attach(attrs *netlink.LinkAttrs) error {
	was, is := n.attached[attrs.Index]
	now := attachment{attrs.Name, n.isOfPods(attrs)}
	wanted := attrs.Flags&unix.IFF_LOOPBACK == 0 && !lb.IsLoop(attrs.Name) && n.wants(attrs.Name)
	if is && wanted && was.pods == now.pods {
		n.attached[attrs.Index] = now
		return nil
	}
	if is {
		delete(n.attached, attrs.Index)
		if err := n.balancer.DetachDevice(attrs.Index); err != nil {
			return fmt.Errorf("%s: %w", attrs.Name, err)
		}
	}
	if !wanted {
		return nil
	}
	err := n.balancer.AttachDevice(lb.Device{Index: attrs.Index, Pods: now.pods})
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		if _, gone := netlink.LinkByIndex(attrs.Index); gone != nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", attrs.Name, err)
	}
	n.attached[attrs.Index] = now
	klog.V(2).InfoS("Device attached to", "device", attrs.Name, "pods", now.pods)
	return nil
}

func (n *network) wants(name string) bool {
	for _, pattern := range n.cfg.Devices {
		if matched, _ := path.Match(pattern, name); matched { // validate has looked at the patterns
			return true
		}
	}
	return false
}

// isOfPods tells whether only pods are behind a device.
func (n *network) isOfPods(attrs *netlink.LinkAttrs) bool {
	switch n.cfg.Local.Mode {
	case InterfaceNamePrefix:
		return strings.HasPrefix(attrs.Name, n.cfg.Local.Interface)
	case BridgeInterface:
		if attrs.Name == n.cfg.Local.Interface {
			return true
		}
		// Packets arrive at a port of the bridge before they do at the bridge.
		master, err := netlink.LinkByIndex(attrs.MasterIndex)
		return attrs.MasterIndex != 0 && err == nil && master.Attrs().Name == n.cfg.Local.Interface
	}
	return false
}

// OnNodeChange is told what the node is: where its pods are, in mode NodeCIDR.
func (n *network) OnNodeChange(node *v1.Node) {
	if n.cfg.Local.Mode == NodeCIDR {
		setPrefixes("Pod CIDRs of the node", node.Spec.PodCIDRs, n.balancer.SetInsiders)
	}
}

func (n *network) OnNodeDelete(*v1.Node) {}
func (n *network) OnNodeSynced()         {}

// OnServiceCIDRsChanged is told where ClusterIPs are.
func (n *network) OnServiceCIDRsChanged(cidrs []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cidrs = cidrs
	n.setClusterIPs()
}

// carries says that all Services are carried now, as far as that can be: what is to none of them may be refused from here on.
func (n *network) carries() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.complete = true
	n.setClusterIPs()
}

func (n *network) setClusterIPs() {
	if n.complete && n.cidrs != nil {
		setPrefixes("Service CIDRs", n.cidrs, n.balancer.SetClusterIPs)
	}
}

// setPrefixes gives the load balancer prefixes, but for those that are none.
func setPrefixes(what string, texts []string, set func([]netip.Prefix) error) {
	var prefixes []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			klog.ErrorS(err, "Prefix ignored", "of", what)
			continue
		}
		prefixes = append(prefixes, p)
	}
	if err := set(prefixes); err != nil {
		klog.ErrorS(err, "Prefixes not set", "of", what)
	}
}

// cleanUDP deletes conntrack's entries of UDP flows to these ports whose endpoints do not serve any more, so that their next packets
// go to others, as kube-proxy does.
func (n *network) cleanUDP(family v1.IPFamily, ports proxy.ServicePortMap, endpoints proxy.EndpointsMap) {
	n.do(func() { conntrack.CleanStaleEntries(conntrack.New(), family, ports, endpoints) })
}

// do calls f on the thread, unless its work has ended.
func (n *network) do(f func()) {
	done := make(chan struct{})
	select {
	case n.work <- func() { f(); close(done) }:
		<-done
	case <-n.done:
	}
}

// names are those of the devices that are attached to, sorted.
func (n *network) names() []string {
	names := []string{}
	for _, a := range n.attached {
		names = append(names, a.name)
	}
	slices.Sort(names)
	return names
}
