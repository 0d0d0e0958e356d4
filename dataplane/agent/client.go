// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// NewClient makes a client from a kubeconfig file, or from the pod's service account if kubeconfig is empty. Content type
// and rates are the defaults of kube-proxy (pkg/proxy/apis/config/v1alpha1/defaults.go).
func NewClient(kubeconfig string) (kubernetes.Interface, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("client configuration: %w", err)
	}
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.QPS, cfg.Burst = 5, 10
	return kubernetes.NewForConfig(rest.AddUserAgent(cfg, "plimsoll-agent"))
}
