// SPDX-License-Identifier: Apache-2.0

// Package clusters is where a Service dataplane runs: providers open clusters of sites, and a site is one node with one
// mode's proxy, a client pod and backend pods.
package clusters

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
)

// ErrNotSupported is wrapped by errors that say what this kernel or host cannot do. A run records such a mode as skipped
// and goes on.
var ErrNotSupported = errors.New("not supported here")

// Reason is an error's text without ErrNotSupported, which it may wrap.
func Reason(err error) string { return strings.TrimSuffix(err.Error(), ": "+ErrNotSupported.Error()) }

// ErrLate is wrapped by errors of what was not done within its limit.
var ErrLate = errors.New("late")

// A Provider makes clusters. The list of providers stands in the command line, because each lives in a folder of its own
// below this package.
type Provider interface {
	// Name is the word after --provider.
	Name() string
	// Doc is one line for `plimsoll list`.
	Doc() string
	// Supports says why the provider cannot give a node what spec wants, wrapping ErrNotSupported; nil when it can.
	Supports(spec ProxySpec) error
	// Create opens one site per spec, in one cluster or in several, and returns when every proxy is healthy, or has failed and its site's Err says why, and
	// every client and backend pod can start processes. On an error, an interrupt among them, nothing is left behind. Errors
	// wrap ErrNotSupported when the host cannot carry the provider.
	Create(ctx context.Context, plan Plan) ([]Cluster, error)
}

// ProxySpec is what a mode wants of its node, as a plain value: providers carry it out and know nothing else of modes.
type ProxySpec struct {
	// Name names the site, unique in a cluster; it is the Node's name too.
	Name string
	// KubeProxy is kube-proxy's mode (iptables, ipvs, nftables); empty for no kube-proxy.
	KubeProxy string
	// IPTables chooses the backend that the node's iptables commands use: nft or legacy. Empty where no mode needs it.
	IPTables string
	// Agent runs the eBPF agent on the node.
	Agent bool
	// Packets has the agent translate packets at the node's devices, and nothing at sockets.
	Packets bool
	// PeerNames has the agent tell getpeername(2) of Services.
	PeerNames bool
	// ConntrackHooks installs an inert table that keeps conntrack and the NAT hooks alive, and nothing else.
	ConntrackHooks bool
	// MasqueradeAll has endpoints see an address of the node, whoever asks at a ClusterIP.
	MasqueradeAll bool
	// LocalMode is how the proxy tells clients inside the cluster from those outside (kube-proxy's detectLocalMode); empty is by the
	// ranges of pods. For InterfaceNamePrefix pods are behind devices whose names begin with PodInterfaces, for BridgeInterface behind
	// the bridge of that name.
	LocalMode, PodInterfaces string
	// MinSyncPeriod is the shortest time between two syncs of the proxy. Nil leaves the proxy's own default.
	MinSyncPeriod *time.Duration
}

// An IPFamily is which addresses a cluster's pods and Services have.
type IPFamily string

const (
	IPv4      IPFamily = "ipv4"
	IPv6      IPFamily = "ipv6"
	DualStack IPFamily = "dual"
)

// IPFamilies are all that there are.
func IPFamilies() []IPFamily { return []IPFamily{IPv4, IPv6, DualStack} }

// A Plan says what a cluster is to hold.
type Plan struct {
	// Name names the run; everything that the cluster creates carries it.
	Name string
	// Dir is the folder for the proxies' configurations and logs; it is kept with the run.
	Dir string
	// Bin is the folder with kube-apiserver, kube-proxy and etcd.
	Bin string
	// Program is the plimsoll binary that pods and agents run; empty is this process's own.
	Program string
	// Sites are the sites to open, in this order.
	Sites []ProxySpec
	// Cache is the folder of what takes long to build and outlives runs.
	Cache string
	// NodeImage is the image of kind's nodes; empty for the provider's choice.
	NodeImage string
	// Static says that nothing is to be started on the nodes or removed from them after Create: where they have kubelets, these
	// stand still from then on.
	Static bool
	// Retain keeps what was made when Create fails, and at Close, and says how to enter it.
	Retain bool
	// Workers is how many workers a kind cluster has at least; sites are on the first of them. 0 is one for each site. Zones are among how many
	// zones they are spread evenly, by label; 0 leaves them without.
	Workers, Zones int
	// IPFamily is which addresses a kind cluster's pods and Services have; empty is IPv4. The lab has those that the kernel has.
	IPFamily IPFamily
	// Progress is told what is being done; nil is silent.
	Progress func(string)
}

// A Testable is a Cluster that Kubernetes' own tests can be run against.
type Testable interface {
	Cluster
	// LoadImages puts the images of a docker archive into all nodes, each under names beside its own.
	LoadImages(ctx context.Context, archive string, names map[string][]string) error
	// Administrator is the kubeconfig file of one, and kubectl the file of such a program. Both are for what Start starts.
	Administrator() (kubeconfig, kubectl string)
	// Start starts a program of this host in the network namespace of the control plane's node, from where all nodes are reached. It
	// ends with the cluster. log receives what it says.
	Start(name string, argv, env []string, log string) (TestProcess, error)
}

// A TestProcess is a program that [Testable.Start] started.
type TestProcess interface {
	// Done is closed when it has ended.
	Done() <-chan struct{}
	// Close ends it and waits for it.
	Close(ctx context.Context) error
}

// A Cluster is what a provider opened.
type Cluster interface {
	// Sites bear the names of the plan's.
	Sites() []Site
	// RESTConfig reaches the API server as an administrator.
	RESTConfig() *rest.Config
	// Etcd reaches the cluster's storage; nil when the provider gives no way there.
	Etcd() *clientv3.Client
	// ServiceCIDR is the API server's range of Service addresses.
	ServiceCIDR() netip.Prefix
	// Versions are what runs in the cluster where that is not of the plan's folder of programs; nil elsewhere.
	Versions() map[string]string
	// Failed is closed when the control plane has ended; Err then says which process of it and how, nil until then. A proxy
	// that ends is its site's affair.
	Failed() <-chan struct{}
	Err() error
	// Pause stops the control plane where it stands, or lets it go on, where it is busy enough to disturb a measurement and no
	// other cluster's site needs it. Without effect elsewhere.
	Pause(ctx context.Context, paused bool) error
	// Quiet stops what the cluster's nodes do of their own accord and no traffic or proxy needs for a while, container runtimes
	// and kubelets, or lets it go on, but for the kubelets of a static plan. Without effect where nodes do nothing of the kind.
	Quiet(ctx context.Context, quiet bool) error
	// Close removes everything that Create made for it.
	Close(ctx context.Context) error
}

// A Writer is a cluster whose API can be given objects without a client.
type Writer interface {
	// Write stores new objects, whose namespaces are set. They are the cluster's afterwards.
	Write(objects []runtime.Object) error
}

// A Site is one mode on one node, with a client pod, backend pods and the proxy.
type Site interface {
	Spec() ProxySpec
	// Enter calls f on a locked thread inside the node's network namespace: sockets opened and processes started in f
	// belong to the node.
	Enter(f func() error) error
	// DialContext opens a connection from the node itself.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
	// IPTables is the path of the node's iptables command; empty when the mode has none.
	IPTables() string
	// Client and Backends are the pods that traffic runs between.
	Client() Pod
	Backends() []Pod
	// EndpointPrefixes are the address ranges that the backend pods answer on, one per backend pod.
	EndpointPrefixes() []netip.Prefix
	// ProxyCgroup is the cgroup2 folder of the proxy's processes; empty without a proxy.
	ProxyCgroup() string
	// Freeze stops every process of the site where it stands, the proxy's and the pods', or lets them go on. It returns when
	// the kernel says so.
	Freeze(ctx context.Context, frozen bool) error
	// Stop ends the proxy for good and returns when its processes are gone; what it programmed stays, save for what the kernel
	// takes back with the process that holds it. A proxy deep in the kernel may take minutes to leave it, so ctx is the only
	// limit. Neither the cluster nor Err takes it for a failure. A site without a proxy, or stopped already, has nothing to end.
	Stop(ctx context.Context) error
	// Err is why the site's proxy does not serve: it ended or never became healthy. Nil while nothing is wrong.
	Err() error
}

// An Outsider is a site that may have a client beyond its node.
type Outsider interface {
	// Outsider returns a host at the far end of the node's uplink, which has these addresses there, one of each family that it is to speak and
	// IPv4's first, and routes to everywhere by the node. Its processes are none of the node's, nor in the node's cgroup. A site has one at most.
	Outsider(addresses ...netip.Addr) (Pod, error)
}

// A Pod is a network namespace behind the node, with a cgroup2 folder below the node's.
type Pod interface {
	Name() string
	Address() netip.Addr
	Cgroup() string
	// Start runs the plan's program with args inside the pod. The process ends with its input.
	Start(ctx context.Context, args ...string) (Process, error)
}

// A Process runs in a pod.
type Process interface {
	Stdin() io.WriteCloser
	Stdout() io.Reader
	// Close ends the process and waits for it.
	Close(ctx context.Context) error
}
