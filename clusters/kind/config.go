// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	"sigs.k8s.io/yaml"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// config is the cluster that kind is to make for sites, which share their proxy's settings.
func (w *world) config(name string, specs []clusters.ProxySpec) (*v1alpha4.Cluster, error) {
	config := &v1alpha4.Cluster{
		TypeMeta: v1alpha4.TypeMeta{Kind: "Cluster", APIVersion: "kind.x-k8s.io/v1alpha4"},
		Name:     name,
		Networking: v1alpha4.Networking{
			IPFamily: v1alpha4.ClusterIPFamily(w.ipFamily()), PodSubnet: w.ranges(podsOf), ServiceSubnet: w.ranges(servicesOf), KubeProxyMode: "none",
		},
		KubeadmConfigPatches:         []string{kubeletPatch},
		KubeadmConfigPatchesJSON6902: quietPatches,
	}
	if w.ownImage() {
		config.KubeadmConfigPatches = append(config.KubeadmConfigPatches, ownPatches)
	}
	spec := specs[0]
	if spec.KubeProxy != "" {
		config.Networking.KubeProxyMode = v1alpha4.ProxyMode(spec.KubeProxy)
	}
	if p := spec.MinSyncPeriod; p != nil && spec.KubeProxy != "" {
		period := map[string]any{"minSyncPeriod": p.String()}
		patch, err := yaml.Marshal(map[string]any{
			"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
			"iptables": period, "ipvs": period, "nftables": period,
		})
		if err != nil {
			return nil, err
		}
		config.KubeadmConfigPatches = append(config.KubeadmConfigPatches, string(patch))
	}
	if spec.KubeProxy == "" {
		config.KubeadmConfigPatchesJSON6902 = append(slices.Clip(config.KubeadmConfigPatchesJSON6902), laterDNS...)
	}
	config.Nodes = []v1alpha4.Node{{Role: v1alpha4.ControlPlaneRole, Image: w.image}}
	for i := range w.workers(len(specs)) {
		worker := v1alpha4.Node{Role: v1alpha4.WorkerRole, Image: w.image}
		if w.plan.Zones > 0 {
			worker.Labels = map[string]string{corev1.LabelTopologyZone: fmt.Sprintf("zone-%d", i%w.plan.Zones)}
		}
		config.Nodes = append(config.Nodes, worker)
	}
	return config, nil
}

// kubeletPatch lets the kubelet start on a host with cgroup v1 (KEP-4569), and gives its lease a life that outlasts a visit to
// the other clusters. Backends have accept queues that no burst of a client's fills.
const kubeletPatch = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
nodeLeaseDurationSeconds: 3600
allowedUnsafeSysctls: [net.core.somaxconn]
`

// ownPatches has kubeadm lay the node image's own patches over its static pods.
const ownPatches = `apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
patches: {directory: /kind/patches}
`

// quietPatches: nobody else could lead, so nobody is asked; and a node that stood still, because other clusters were visited, is
// not taken for dead. kubeadm's arguments are a list from v1beta4 on.
var quietPatches = []v1alpha4.PatchJSON6902{{
	Group: "kubeadm.k8s.io", Version: "v1beta4", Kind: "ClusterConfiguration",
	Patch: `- {op: add, path: /controllerManager/extraArgs/-, value: {name: leader-elect, value: "false"}}
- {op: add, path: /controllerManager/extraArgs/-, value: {name: node-monitor-grace-period, value: 6h}}
- {op: add, path: /scheduler/extraArgs, value: [{name: leader-elect, value: "false"}]}
- {op: add, path: /apiServer/extraArgs/-, value: {name: etcd-count-metric-poll-period, value: "0"}}
- {op: add, path: /apiServer/extraArgs/-, value: {name: etcd-db-metric-poll-interval, value: "0"}}
- {op: add, path: /etcd, value: {local: {dataDir: /var/lib/etcd, extraArgs: [{name: unsafe-no-fsync, value: "true"}, {name: quota-backend-bytes, value: "8589934592"}]}}}
`,
}, {
	Group: "kubeadm.k8s.io", Version: "v1beta3", Kind: "ClusterConfiguration",
	Patch: `- {op: add, path: /controllerManager/extraArgs/leader-elect, value: "false"}
- {op: add, path: /controllerManager/extraArgs/node-monitor-grace-period, value: 6h}
- {op: add, path: /scheduler/extraArgs, value: {leader-elect: "false"}}
`,
}}

// laterDNS leaves CoreDNS out where nothing carries Services yet. One that has found the API server's Service without an answer asks
// again after up to half a minute.
var laterDNS = []v1alpha4.PatchJSON6902{
	{Group: "kubeadm.k8s.io", Version: "v1beta4", Kind: "InitConfiguration", Patch: "- {op: add, path: /skipPhases/-, value: addon/coredns}\n"},
	{Group: "kubeadm.k8s.io", Version: "v1beta3", Kind: "InitConfiguration", Patch: "- {op: add, path: /skipPhases/-, value: addon/coredns}\n"},
}
